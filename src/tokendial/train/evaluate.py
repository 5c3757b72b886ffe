"""Using a finished run: accuracy, cost and speed along the dial, and predictions."""

import csv
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.atomic import replacing
from tokendial.compensate import Compensator
from tokendial.measure import ShareMeter
from tokendial.speed import Optimized, Speed, sped_up
from tokendial.tasks import Task
from tokendial.train.batches import eval_loader
from tokendial.train.runs import Run
from tokendial.vit import DialViT

_SPEED_SECONDS = 1.0


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
    """Images, or clips, measured on this machine, this batch size, forward pass alone."""
    tokens: int
    """Tokens (prefix included) that leave the last layer."""
    share: float | None
    """Share of the patch tokens that the FFNs processed, measured on the validation set; None for
    methods that choose no tokens by their values."""

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
    """Measured with it, on this machine, this batch size, forward pass alone."""
    tokens: int
    """Tokens (prefix included) that leave the last layer."""


@torch.no_grad()
def evaluate_loader(
    model: DialViT | Optimized,
    loader: DataLoader[Any],
    task: Task,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Metrics of `model` over a loader, at its present degree; of all processes together.

    What runs are judged by comes first.
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
    return {name: float(value) for name, value in metrics.compute().items()}


def parse_degrees(text: str, offered: tuple[int, ...]) -> list[int]:
    """Degrees written as "0,4,8", "0..16", "0..16:4" or "all".

    Raises:
        ValueError: If the text is none of these, or a degree is not offered.
    """
    if text == "all":
        return list(offered)
    degrees: list[int] = []
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, dots, last = span.partition("..")
        try:
            if dots:
                degrees += range(int(first), int(last) + 1, int(step or 1))
            else:
                degrees.append(int(part))
        except ValueError:
            raise ValueError(
                f"degrees must look like 0,4,8 or 0..16 or 0..16:4 or all, got {text!r}."
            ) from None
    if not degrees:
        raise ValueError(f"degrees: {text!r} names none; a span must rise, as in 0..16.")
    if bad := [degree for degree in degrees if degree not in offered]:
        raise ValueError(f"degrees must lie in [0, {offered[-1]}], got {bad[0]}.")
    return degrees


def evaluate(
    run: Run,
    degrees: str = "all",
    *,
    batch_size: int = 64,
    device: str | None = None,
    speed: Speed | None = None,
) -> list[DegreeRow]:
    """Accuracy, cost and measured speed of a run's best model at several degrees.

    Args:
        run: A run with a model.
        degrees: Such as "0,4,8"; "all".
        batch_size: Images per forward pass.
        device: Where to compute; None: the accelerator if there is one.
        speed: What to do for it first.

    Raises:
        ValueError: If the run has no model, or a degree is not offered.
    """
    model = run.model().to(device or default_device())
    wanted = parse_degrees(degrees, model.degrees)
    task, loader = _validation(run, model, batch_size)
    images = some_images(loader, model, batch_size)
    fast = sped_up(model, images.to(next(model.parameters()).device), speed, wanted)
    turned = fast.model if isinstance(fast, Optimized) else fast
    meter = ShareMeter(turned) if ShareMeter.fits(turned) else None
    rows = []
    for degree in wanted:
        fast.set_degree(degree)
        cost = model.cost(degree)
        with meter or nullcontext():
            scores = evaluate_loader(fast, loader, task)
        rows.append(
            DegreeRow(
                degree=degree,
                scores=scores,
                gmacs=cost.gmacs,
                images_per_s=images_per_second(fast, images),
                tokens=cost.tokens_per_layer[-1],
                share=meter.share if meter else None,
            )
        )
    return rows


def evaluate_bridged(
    runs: Sequence[Run],
    compensator: Compensator,
    degrees: str = "all",
    *,
    sources: Sequence[int] | None = None,
    batch_size: int = 64,
    device: str | None = None,
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
    rows = []
    for number, run in enumerate(runs):
        recipe = run.recipe()
        unreduced = recipe.reduce is None
        model = run.model(compensator.reduce_config if unreduced else None).to(on)
        source = 0 if unreduced else model.degree
        if sources is not None:
            source = sources[number]
        wanted = parse_degrees(degrees, model.degrees[: compensator.steps + 1])
        task, loader = _validation(run, model, batch_size)
        images = some_images(loader, model, batch_size)
        for target in wanted:
            model.set_degree(target)
            plain = _judged(evaluate_loader(model, loader, task))
            compensator.attach(model, source)
            try:
                cost = model.cost()
                row = BridgedRow(
                    run=recipe.output,
                    source=source,
                    degree=target,
                    plain=plain,
                    accuracy=_judged(evaluate_loader(model, loader, task)),
                    gmacs=cost.gmacs,
                    images_per_s=images_per_second(model, images),
                    tokens=cost.tokens_per_layer[-1],
                )
            finally:
                compensator.detach(model)
            rows.append(row)
    return rows


def _judged(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def _validation(run: Run, model: DialViT, batch_size: int) -> tuple[Task, Any]:
    """The task of a run, and a loader of its validation set."""
    recipe, task = run.recipe(), run.task()
    data = recipe.data.build(recipe.seed)
    loader = eval_loader(
        data.val,
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
def images_per_second(model: DialViT | Optimized, images: Tensor) -> float:
    """Throughput of the forward pass at the present degree: median over about a second of runs.

    The images matter where a method chooses tokens by their values.
    """
    images = images.to(next(model.parameters()).device)
    model.eval()
    seconds: list[float] = []
    # The first passes choose kernels and fill caches; they do not count.
    for _ in range(2):
        _timed(model, images)
    while len(seconds) < 5 or (sum(seconds) < _SPEED_SECONDS and len(seconds) < 200):
        seconds.append(_timed(model, images))
    return len(images) / median(seconds)


def _timed(model: DialViT | Optimized, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def write_rows(rows: Sequence[DegreeRow] | Sequence[BridgedRow], path: Path) -> None:
    """Write the table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        flat = [_flat(asdict(row)) for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its scores as columns."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns |= value if isinstance(value, dict) else {name: value}
    return columns
