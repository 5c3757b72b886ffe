"""Evaluation of a run's cascade beside its degrees: scores, cost and measured speed."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendial.cascade import Cascade
from tokendial.measure import Timing
from tokendial.runs.cascade import check_has_cascades, mean_gmacs, time_cascade
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import (
    ProgressCallback,
    StepCounter,
    evaluate_loader,
    first_images,
    no_progress,
    validation_set,
)
from tokendial.runs.run import Run
from tokendial.runs.started_runtime import start_runtime
from tokendial.runtimes import PLAIN, Runtime

_TIMED, _MIN_BATCHES, _MAX_BATCHES = 200, 3, 100
"""Images to time, and the fewest and the most batches of them. Other images in each batch, because
they decide a cascade's time."""


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """Scores, cost and speed of a cascade, or of one of the degrees beside it."""

    degrees: str
    """The degree, or those of the cascade, the cheapest first, such as "8→0"."""
    scores: dict[str, float]
    """Metrics on the validation set, by name. The first one is the task's main metric."""
    early: float | None
    """Share of the images that the cascade's first degree answers; None for a fixed degree."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9: for a cascade their mean."""
    images_per_s: float
    """Images per second of the mean batch, at the batch size of the evaluation."""
    speedup: float
    """How many times as fast it is as the cascade's last degree."""
    timing: Timing
    """Measured time of one batch. All rows took turns on each batch."""

    @property
    def disturbed(self) -> bool:
        """Whether the times differ too much to be trusted: another program used the machine. Those
        of a cascade differ by themselves."""
        return self.early is None and self.timing.disturbed


def evaluate_cascade(
    run: Run,
    degrees: str | None = None,
    *,
    batch_size: int = 64,
    device: str | None = None,
    runtime: Runtime = PLAIN,
    progress: ProgressCallback = no_progress,
) -> list[AnsweredRow]:
    """Evaluate the cascade of a run, and fixed degrees beside it.

    Args:
        run: A run with a cascade, which `calibrate_cascade` writes.
        degrees: Degrees as text, see `parse_degrees`. None: those of the cascade.
        batch_size: Images per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        runtime: Where and how the model computes: as in the calibration.
        progress: Called after each batch.

    Returns:
        The cascade's row, then one per degree, from the highest on. The last one is that of the
        cascade's last degree.

    Raises:
        ValueError: If the run has no cascade that fits, a degree is not offered, or the runtime
            cannot run it.
    """
    check_has_cascades(run)
    model = run.model().to(device or default_device())
    cascade = Cascade.load(
        model, run.cascade_file, revision=run.revision(), numerics=runtime.numerics
    )
    last = cascade.degrees[-1]
    others = degrees_to_show(model, degrees) if degrees else cascade.degrees
    fixed = [*sorted({*others} - {last}, reverse=True), last]
    task, loader = validation_set(run, model, batch_size)
    rounds = min(_MAX_BATCHES, max(_MIN_BATCHES, _TIMED // batch_size))
    images = first_images(loader, model, rounds * batch_size)
    started = sorted({*fixed, *cascade.degrees})
    fast = start_runtime(run, runtime, model, images[:batch_size].to(model.device), started)
    cascade.model = fast
    counter = StepCounter(progress, (1 + len(fixed)) * len(loader))
    counter.text = "cascade"
    answered: Counter[int] = Counter()

    def answer(batch: Tensor) -> Tensor:
        found = cascade.answer(batch)
        answered.update(found.degrees)
        return found.logits

    scores = [evaluate_loader(fast, loader, task, predict=answer, after_batch=counter.step)]
    for degree in fixed:
        fast.set_degree(degree)
        counter.text = f"degree {degree}"
        scores.append(evaluate_loader(fast, loader, task, after_batch=counter.step))
    counter.show(f"measuring the speed of the cascade and {len(fixed)} degrees in turns")
    size = min(batch_size, len(images))
    batches = torch.split(images[: len(images) // size * size], size)
    timings = time_cascade(cascade, fixed, batches * math.ceil(rounds / len(batches)))
    seconds = [sum(timing.times) / len(timing.times) for timing in timings]
    shares = [answered[degree] / answered.total() for degree in cascade.degrees]
    stages = [model.cost(degree).gmacs for degree in cascade.degrees]
    gmacs = [mean_gmacs(stages, shares), *(model.cost(degree).gmacs for degree in fixed)]
    names = ["→".join(map(str, cascade.degrees)), *map(str, fixed)]
    return [
        AnsweredRow(
            degrees=name,
            scores=scores[index],
            early=None if index else shares[0],
            gmacs=gmacs[index],
            images_per_s=size / seconds[index],
            speedup=seconds[-1] / seconds[index],
            timing=timings[index],
        )
        for index, name in enumerate(names)
    ]
