"""Using a finished run: accuracy, cost and speed along the dial, and predictions."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.compensate import Compensator
from tokendial.measure import DISTURBED, ShareMeter, Timing, time_in_rounds
from tokendial.model.dial_vit import DialViT
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.loaders import eval_loader
from tokendial.runs.run import Run
from tokendial.tasks import Classification, Task
from tokendial.tune import OptimizedViT, SpeedSettings, apply_speed

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassConfusionMatrix

_SPEED_SECONDS = 1.0
"""Time to spend on measuring the speed of each degree."""

Progress = Callable[[int, int, str], object]
"""Told how many parts of the work are done, of how many, and what is being done."""


def no_progress(done: int, total: int, text: str) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True)
class DegreeRow:
    """A run at one degree of the dial."""

    degree: int
    """Degree of the dial."""
    scores: dict[str, float]
    """Metrics of the task on the validation set; what runs are judged by comes first."""
    gmacs: float
    """Multiply-accumulates for one image, or one clip, in 1e9."""
    images_per_s: float
    """Images (or clips) per second, measured on this machine at this batch size, forward pass
    alone; all degrees took turns, see `tokendial.measure.time_in_rounds`."""
    speedup: float
    """Times as fast as the first degree that was evaluated."""
    spread: float
    """Quartile spread of the measured times, as a fraction of their median."""
    tokens: int
    """Tokens (prefix included) that leave the last layer."""
    share: float | None
    """Share of the patch tokens that the FFNs processed, measured on the validation set; None for
    methods that choose no tokens by their values."""
    confusion: Tensor | None
    """[classes, classes] validation images of each true class (row) that were given each class
    (column); None for tasks other than classification with one label per image."""

    @property
    def disturbed(self) -> bool:
        """Whether something else used the machine while speed was measured."""
        return self.spread > DISTURBED

    @property
    def accuracy(self) -> float:
        """What runs are judged by: top-1, the mean over labels, S-measure or mean IoU."""
        return _judged(self.scores)


@dataclass(frozen=True, slots=True)
class BridgedRow:
    """A run at one degree of the dial, without and with a compensator."""

    run: str
    """Folder of the run."""
    source: int
    """Degree that it was trained at."""
    degree: int
    """Degree that it runs at, the target."""
    plain: float
    """Accuracy (or what else runs are judged by) without the compensator, in [0, 1]."""
    accuracy: float
    """Accuracy with it."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9; the same with and without."""
    images_per_s: float
    """Images per second, measured with it on this machine at this batch size, forward pass alone;
    all degrees of a run took turns."""
    spread: float
    """Quartile spread of the measured times, as a fraction of their median."""
    tokens: int
    """Tokens (prefix included) that leave the last layer."""

    @property
    def disturbed(self) -> bool:
        """Whether something else used the machine while speed was measured."""
        return self.spread > DISTURBED


@torch.no_grad()
def evaluate_loader(
    model: DialViT | OptimizedViT,
    loader: DataLoader[Any],
    task: Task,
    accelerator: Accelerator | None = None,
    *,
    confusion: "MulticlassConfusionMatrix | None" = None,
    after_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Metrics of `model` over a loader, at its present degree; of all processes together.

    Args:
        model: The model.
        loader: Gives batches of images and targets.
        task: What the model has learnt.
        accelerator: Of a training run; None: the arithmetic of the model as it is.
        confusion: Also takes in logits and targets; None: nothing does.
        after_batch: Called after each batch, such as to show progress.

    Returns:
        Each metric by its name. What runs are judged by comes first.
    """
    device = next(model.parameters()).device
    metrics = task.metrics().to(device)
    model.eval()
    for images, targets in loader:
        with accelerator.autocast() if accelerator else nullcontext():
            logits = task.predict(model, images.to(device))
        if isinstance(targets, Tensor):
            targets = targets.to(device).long()
        metrics.update(logits.float(), targets)
        if confusion is not None:
            confusion.update(logits.float().cpu(), targets.cpu())
        after_batch()
    return {name: float(value) for name, value in metrics.compute().items()}


def evaluate(
    run: Run,
    degrees: str = "all",
    *,
    batch_size: int = 64,
    device: str | None = None,
    speed: SpeedSettings | None = None,
    progress: Progress = no_progress,
) -> list[DegreeRow]:
    """Accuracy, cost and measured speed of a run's best model at several degrees.

    Args:
        run: A run with a model.
        degrees: Such as "0,4,8", "all" or "every", see `parse_degrees`.
        batch_size: Images per forward pass.
        device: Where to compute; None: the accelerator if there is one.
        speed: How to make the model faster first; None: it runs as it is.
        progress: Told after each batch.

    Raises:
        ValueError: If the run has no model, or a degree is not offered.
    """
    model = run.model().to(device or default_device())
    wanted = degrees_to_show(model, degrees)
    task, loader = _validation(run, model, batch_size)
    images = some_images(loader, model, batch_size)
    fast = apply_speed(model, images.to(next(model.parameters()).device), speed, wanted)
    turned = fast.model if isinstance(fast, OptimizedViT) else fast
    meter = ShareMeter(turned) if ShareMeter.fits(turned) else None
    report = _Report(progress, len(wanted) * len(loader))
    scores, shares, confusions = [], [], []
    for degree in wanted:
        fast.set_degree(degree)
        report.text = f"degree {degree}"
        confusion = _confusion(task)
        with meter or nullcontext():
            scores.append(
                evaluate_loader(
                    fast, loader, task, confusion=confusion, after_batch=report.one_more
                )
            )
        shares.append(meter.share if meter else None)
        confusions.append(None if confusion is None else confusion.compute())
    report.tell(f"measuring the speed of {len(wanted)} degrees in turns")
    timings = time_degrees(fast, images, wanted)
    rows = []
    for place, (degree, timing) in enumerate(zip(wanted, timings, strict=True)):
        cost = model.cost(degree)
        rows.append(
            DegreeRow(
                degree=degree,
                scores=scores[place],
                gmacs=cost.gmacs,
                images_per_s=len(images) / timing.seconds,
                speedup=timings[0].seconds / timing.seconds,
                spread=timing.spread,
                tokens=cost.tokens_per_layer[-1],
                share=shares[place],
                confusion=confusions[place],
            )
        )
    return rows


class _Report:
    """Counts the parts that are done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done, self.text = progress, total, 0, ""

    def one_more(self) -> None:
        self.done += 1
        self.progress(self.done, self.total, self.text)

    def tell(self, text: str) -> None:
        self.progress(self.done, self.total, text)


def _confusion(task: Task) -> "MulticlassConfusionMatrix | None":
    if not isinstance(task, Classification) or task.multi_label or task.num_classes < 2:
        return None
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(task.num_classes)


def evaluate_bridged(
    runs: Sequence[Run],
    compensator: Compensator,
    degrees: str = "all",
    *,
    sources: Sequence[int] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: Progress = no_progress,
) -> list[BridgedRow]:
    """Every run at every degree, without and with a compensator: the source x target grid.

    Args:
        runs: Runs of models fine-tuned from the compensator's backbone; those that were trained
            without reduction run with the compensator's, from degree 0.
        compensator: It.
        degrees: Targets, such as "0..16".
        sources: The degree that each run was trained at; None: as the runs say.
        batch_size: Images per forward pass.
        device: Where to compute; None: the accelerator if there is one.
        progress: Told after each batch.

    Raises:
        ValueError: If a run has no model, the compensator does not fit it, a degree is not offered,
            or there are not as many sources as runs.
    """
    if sources is not None and len(sources) != len(runs):
        raise ValueError(
            f"sources must be one degree for each of the {len(runs)} runs, got {len(sources)}."
        )
    on = device or default_device()
    compensator = compensator.to(on).eval()
    rows: list[BridgedRow] = []
    for number, run in enumerate(runs):
        unreduced = run.recipe().reduce is None
        model = run.model(compensator.reduce_config if unreduced else None).to(on)
        source = 0 if unreduced else model.degree
        if sources is not None:
            source = sources[number]
        wanted = degrees_to_show(model, degrees, model.degrees[: compensator.steps + 1])
        rows += _bridged(run, model, compensator, source, wanted, batch_size, progress)
    return rows


def _bridged(
    run: Run,
    model: DialViT,
    compensator: Compensator,
    source: int,
    degrees: Sequence[int],
    batch_size: int,
    progress: Progress,
) -> list[BridgedRow]:
    """The rows of one run: all degrees without the compensator, then all with it."""
    task, loader = _validation(run, model, batch_size)
    images = some_images(loader, model, batch_size)
    report = _Report(progress, 2 * len(degrees) * len(loader))

    def accuracy(degree: int) -> float:
        model.set_degree(degree)
        report.text = f"degree {degree}"
        return _judged(evaluate_loader(model, loader, task, after_batch=report.one_more))

    plain = list(map(accuracy, degrees))
    compensator.attach(model, source)
    try:
        compensated = list(map(accuracy, degrees))
        report.tell(f"measuring the speed of {len(degrees)} degrees in turns")
        timings = time_degrees(model, images, degrees)
    finally:
        compensator.detach(model)
    rows = []
    for place, degree in enumerate(degrees):
        cost = model.cost(degree)
        rows.append(
            BridgedRow(
                run=run.recipe().output,
                source=source,
                degree=degree,
                plain=plain[place],
                accuracy=compensated[place],
                gmacs=cost.gmacs,
                images_per_s=len(images) / timings[place].seconds,
                spread=timings[place].spread,
                tokens=cost.tokens_per_layer[-1],
            )
        )
    return rows


def _judged(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def _validation(run: Run, model: DialViT, batch_size: int) -> tuple[Task, Any]:
    """The task of a run, and a loader of its validation set."""
    recipe, task = run.recipe(), run.task()
    loader = eval_loader(
        run.data().val,
        task.eval_transform(model.anatomy),
        batch_size=task.eval_batch(batch_size),
        workers=recipe.train.workers,
    )
    return task, loader


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def some_images(loader: DataLoader[Any], model: DialViT, batch_size: int) -> Tensor:
    """The first images of a loader, at most [batch_size, 3, H, W], of the model's size.

    Of videos: the first clips, [batch_size, T, 3, H, W].
    """
    height, width = model.anatomy.image_size
    found: list[Tensor] = []
    for images, _ in loader:
        if model.anatomy.frames is not None:
            images = images[:, 0]
        found += images[..., :height, :width]
        if len(found) >= batch_size:
            break
    return torch.stack(found[:batch_size])


@torch.no_grad()
def time_degrees(
    model: DialViT | OptimizedViT, images: Tensor, degrees: Sequence[int]
) -> list[Timing]:
    """Time of the forward pass at each degree, all degrees in turns.

    Args:
        model: A wrapped or an optimised model.
        images: [B, 3, H, W], as they will come: methods that choose tokens by their values take
            more or less time for others.
        degrees: Degrees to time.
    """
    images = images.to(next(model.parameters()).device)
    model.eval()
    return time_in_rounds(
        degrees,
        model.set_degree,
        lambda: model(images),
        device=images.device,
        seconds=_SPEED_SECONDS,
    )
