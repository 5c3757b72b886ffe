"""Evaluation of a run along the dial: scores, cost and measured speed at each degree."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.measure import ShareMeter, Timing, time_in_rounds
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.loaders import eval_loader
from tokendial.runs.run import Run
from tokendial.runs.started_runtime import start_runtime
from tokendial.runtimes import PLAIN, Runtime
from tokendial.tasks import Classification, Task
from tokendial.tune import OptimizedViT

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassConfusionMatrix

_TIMING_SECONDS = 1.0
"""Time to spend on measuring the speed of each degree."""

ProgressCallback = Callable[[int, int, str], object]
"""Called with the number of finished steps, the number of all steps, and the step's name."""


def no_progress(done: int, total: int, text: str) -> None:
    """Show nothing: the default `ProgressCallback`."""


@dataclass(frozen=True, slots=True)
class DegreeRow:
    """Scores, cost and speed of a run at one degree of the dial."""

    degree: int
    """Degree of the dial."""
    scores: dict[str, float]
    """Metrics on the validation set, by name. The first one is the task's main metric."""
    gmacs: float
    """Multiply-accumulates for one image (or one video clip), in 1e9."""
    images_per_s: float
    """Images (or clips) per second of the forward pass, at the batch size of the evaluation."""
    speedup: float
    """How many times as fast this degree is as the first degree of the evaluation."""
    timing: Timing
    """Measured time of one forward pass. All degrees took turns."""
    tokens: int
    """Tokens, prefix tokens included, that leave the last layer."""
    share: float | None
    """Fraction of the patch tokens that FFNs processed, measured on the validation set. None for
    methods whose token counts do not depend on the image."""
    confusion: Tensor | None
    """Confusion matrix [classes, classes]: images of each true class (row) by predicted class
    (column). None unless the task is classification with one label per image."""

    @property
    def spread(self) -> float:
        """Quartile spread of the measured times, as a fraction of their median."""
        return self.timing.spread

    @property
    def disturbed(self) -> bool:
        """Whether the times differ too much to be trusted: another program used the machine."""
        return self.timing.disturbed

    @property
    def accuracy(self) -> float:
        """Value of the task's main metric, the first one: accuracy unless the recipe's `metrics`
        name another, S-measure for binary masks, mean IoU for masks of classes, the cosine to the
        frozen backbone for embeddings."""
        return main_score(self.scores)


@torch.no_grad()
def evaluate_loader(
    model: InferenceModel,
    loader: DataLoader[Any],
    task: Task,
    *,
    predict: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    confusion: "MulticlassConfusionMatrix | None" = None,
    after_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Compute the metrics of a model over a loader, at the model's present degree.

    In distributed training the metrics are those of all processes together.

    Args:
        model: The model. It is left in evaluation mode.
        loader: Gives batches of images and targets.
        task: What the model was trained for.
        predict: Gives the logits of a batch. By default the task's prediction with the model.
        autocast: Makes the context of each forward pass, such as `Accelerator.autocast`. By
            default the model computes in the precision of its weights.
        confusion: Confusion matrix that is updated with every batch, in addition to the metrics.
        after_batch: Called after each batch, for example to show progress.

    Returns:
        The metrics by name. The first one is the task's main metric.
    """
    device = model.device
    metrics = task.metrics().to(device)
    model.eval()
    predict = predict or partial(task.predict, model)
    for images, targets in loader:
        images = images.to(device)
        if isinstance(targets, Tensor):
            targets = targets.to(device).long()
        with autocast():
            logits = predict(images)
            targets = task.batch_targets(images, targets)
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
    runtime: Runtime = PLAIN,
    progress: ProgressCallback = no_progress,
) -> list[DegreeRow]:
    """Evaluate a run's best model at several degrees: scores, cost and measured speed.

    Args:
        run: A run with a model.
        degrees: Degrees as text, such as "0,4,8", "all" or "every"; see `parse_degrees`.
        batch_size: Images per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        runtime: Where and how the model computes.
        progress: Called after each batch.

    Returns:
        One row per degree, in the order of `degrees`.

    Raises:
        ValueError: If the run has no model, a degree is not offered, or the runtime cannot run it.
    """
    model = run.model().to(device or default_device())
    wanted = degrees_to_show(model, degrees)
    task, loader = validation_set(run, model, batch_size)
    images = first_images(loader, model, batch_size)
    fast = start_runtime(run, runtime, model, images.to(model.device), wanted)
    dial_vit = fast.model if isinstance(fast, OptimizedViT) else fast
    meter = ShareMeter(dial_vit) if ShareMeter.supports(dial_vit) else None
    counter = StepCounter(progress, len(wanted) * len(loader))
    scores, shares, confusions = [], [], []
    for degree in wanted:
        fast.set_degree(degree)
        counter.text = f"degree {degree}"
        confusion = _confusion_matrix(task)
        with meter or nullcontext():
            scores.append(
                evaluate_loader(fast, loader, task, confusion=confusion, after_batch=counter.step)
            )
        shares.append(meter.share if meter else None)
        confusions.append(None if confusion is None else confusion.compute())
    counter.show(f"measuring the speed of {len(wanted)} degrees in turns")
    timings = time_degrees(fast, images, wanted)
    rows = []
    for index, (degree, timing) in enumerate(zip(wanted, timings, strict=True)):
        cost = model.cost(degree)
        rows.append(
            DegreeRow(
                degree=degree,
                scores=scores[index],
                gmacs=cost.gmacs,
                images_per_s=len(images) / timing.seconds,
                speedup=timings[0].seconds / timing.seconds,
                timing=timing,
                tokens=cost.tokens_per_layer[-1],
                share=shares[index],
                confusion=confusions[index],
            )
        )
    return rows


class StepCounter:
    """Counts finished steps and reports them to a `ProgressCallback`."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self.progress, self.total, self.done, self.text = progress, total, 0, ""

    def step(self) -> None:
        """Count one more step, and report it under the present text."""
        self.done += 1
        self.progress(self.done, self.total, self.text)

    def show(self, text: str) -> None:
        """Report another text without counting a step."""
        self.progress(self.done, self.total, text)


def _confusion_matrix(task: Task) -> "MulticlassConfusionMatrix | None":
    """An empty confusion matrix; None if the task has none."""
    if not isinstance(task, Classification) or task.multi_label or task.num_classes < 2:
        return None
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(task.num_classes)


def main_score(scores: dict[str, float]) -> float:
    """Value of the task's main metric, which is the first one."""
    return next(iter(scores.values()))


def validation_set(run: Run, model: DialViT, batch_size: int) -> tuple[Task, DataLoader[Any]]:
    """The task of a run, and a loader of its validation set."""
    recipe, task = run.recipe(), run.task()
    loader = eval_loader(
        run.data().val,
        task.eval_transform(model.anatomy),
        batch_size=task.eval_batch_size(batch_size),
        workers=recipe.train.workers,
    )
    return task, loader


def first_images(loader: DataLoader[Any], model: DialViT, batch_size: int) -> Tensor:
    """The first images of a loader, cropped to the model's image size.

    Returns:
        At most [batch_size, 3, H, W]. For videos, the first clip of each: [batch_size, T, 3, H, W].
    """
    height, width = model.anatomy.image_size
    collected: list[Tensor] = []
    for images, _ in loader:
        if model.anatomy.frames is not None:
            images = images[:, 0]
        collected += images[..., :height, :width]
        if len(collected) >= batch_size:
            break
    return torch.stack(collected[:batch_size])


@torch.no_grad()
def time_degrees(model: InferenceModel, images: Tensor, degrees: Sequence[int]) -> list[Timing]:
    """Measure the forward pass at each degree. The degrees take turns.

    Args:
        model: The model. It is left in evaluation mode.
        images: [B, 3, H, W]. They should be real images: the speed of methods that choose tokens by
            their values depends on them.
        degrees: Degrees to measure.

    Returns:
        One timing per degree.
    """
    images = images.to(model.device)
    model.eval()
    return time_in_rounds(
        degrees,
        model.set_degree,
        lambda _: model(images),
        device=images.device,
        seconds=_TIMING_SECONDS,
    )
