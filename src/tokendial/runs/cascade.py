"""Calibration of a cascade for a run, beside what fixed degrees give at the same time."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.cascade import (
    Cascade,
    CascadeCalibration,
    Observations,
    ScoreName,
    choose_thresholds,
)
from tokendial.cascade.thresholds import Harm, check_promise, read_promise
from tokendial.measure import Interval, Timing, bootstrap_interval, mean_difference, time_in_rounds
from tokendial.measure.timing import percentiles
from tokendial.runs.degrees import spread_degrees
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import (
    ProgressCallback,
    StepCounter,
    first_images,
    no_progress,
    validation_set,
)
from tokendial.runs.image_scores import image_scores
from tokendial.runs.run import Run
from tokendial.runs.started_runtime import start_runtime
from tokendial.runtimes import PLAIN, Runtime
from tokendial.tasks import Classification, Embeddings, Task
from tokendial.tasks.dense_prediction import DensePrediction

_FIXED = 5
"""Number of fixed degrees beside the cascade."""
_TIMED = 100
"""Images that are timed, one by one."""


@dataclass(frozen=True, slots=True)
class CascadeRow:
    """A cascade, or a fixed degree, on the validation images."""

    name: str
    """What answers: "cascade" or "degree N"."""
    accuracy: Interval
    """Fraction of right answers; with several labels, of images with all labels right. Of masks,
    the mean overlap (IoU) with the true ones."""
    minus_last: Interval
    """Its difference to the last degree, paired by image."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9: for a cascade their mean."""
    timing: Timing
    """Time of one image. All rows took turns, image by image."""

    @property
    def mean_ms(self) -> float:
        """Mean time of an image in milliseconds."""
        return 1e3 * sum(self.timing.times) / len(self.timing.times)

    @property
    def percentiles_ms(self) -> tuple[float, float]:
        """Median and 99th percentile of the time of an image, in milliseconds."""
        middle, high = percentiles(self.timing.times, 50, 99)
        return 1e3 * middle, 1e3 * high


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """A calibrated cascade of a run, and how it compares."""

    degrees: str
    """Its degrees, the cheapest first, such as "8→0"."""
    measure: str
    """What `CascadeRow.accuracy` is: "accuracy" or "IoU"."""
    calibration: CascadeCalibration
    """The thresholds and their bound."""
    rows: list[CascadeRow]
    """The cascade first, then fixed degrees from the cheapest to the last one."""
    minus_fixed: Interval
    """Accuracy minus the best that one fixed degree, or a mix of two, gives in the same mean time.
    Paired by image."""
    minus_random: Interval
    """Accuracy minus that of sending on as many images at random. Paired by image."""


def calibrate_cascade(
    run: Run,
    degrees: Sequence[int],
    *,
    max_changed: float | None = None,
    max_lost: float | None = None,
    confidence: float = 0.95,
    score: ScoreName = "margin",
    batch_size: int = 64,
    device: str | None = None,
    runtime: Runtime = PLAIN,
    progress: ProgressCallback = no_progress,
) -> CascadeReport:
    """Calibrate a cascade on the validation images of a run, compare it, and save it with the run.

    Args:
        run: A run that gives images classes or masks.
        degrees: Two or three degrees, the cheapest first.
        max_changed: Largest share of images that may get another answer than at the last degree.
        max_lost: Largest share of images that may get a wrong answer where the last one is right.
        confidence: Probability with which the bound is to hold.
        score: How sure the model is, see `Cascade`.
        batch_size: Images per forward pass of the calibration.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        runtime: Where and how the model computes.
        progress: Called after each batch.

    Returns:
        The report. The cascade is written to `run.cascade_file`.

    Raises:
        ValueError: If the run has no cascades (see `check_has_cascades`), there are too few
            validation images for the bound, or `Cascade` or `Runtime.start` raises one.
    """
    harm, allowed = read_promise(max_changed, max_lost)
    task = check_has_cascades(run)
    if harm == "lost" and not isinstance(task, Classification):
        raise ValueError("max_lost is for classes, and this run gives masks: use max_changed.")
    model = run.model().to(device or default_device())
    Cascade(model, degrees)  # refuses degrees before anything is exported
    _, loader = validation_set(run, model, batch_size)
    count = len(loader.dataset)  # type: ignore[arg-type]  # it has a length
    check_promise(harm, allowed, confidence, count)  # before the images are run
    between = tuple(d for d in model.degrees if degrees[-1] <= d <= degrees[0])
    fixed = sorted({*spread_degrees(model, _FIXED, between), *degrees})
    example = first_images(loader, model, batch_size).to(model.device)
    fast = start_runtime(run, runtime, model, example, fixed)
    multi_label = isinstance(task, Classification) and task.multi_label
    cascade = Cascade(fast, degrees, score=score, multi_label=multi_label)
    counter = StepCounter(progress, len(fixed) * len(loader))

    def show(degree: int) -> None:
        counter.text = f"degree {degree}"
        counter.step()

    observations, scores = _observe(cascade, fixed, loader, task, harm, before_batch=show)
    found = choose_thresholds(observations, harm, allowed, confidence=confidence)
    cascade.calibration = found
    cascade.save(run.cascade_file, revision=run.revision(), numerics=runtime.numerics)
    counter.show("measuring the time of one image")
    one_by_one = torch.split(first_images(loader, model, _TIMED), 1)
    timings = time_cascade(cascade, fixed, one_by_one)
    costs = {degree: model.cost(degree).gmacs for degree in fixed}
    stages = observations.stage_of(found.thresholds)
    measure = "accuracy" if isinstance(task, Classification) else "IoU"
    return _report(cascade, stages, scores, costs, timings, measure)


def check_has_cascades(run: Run) -> Task:
    """Return the task of a run.

    Raises:
        ValueError: If a cascade cannot answer for it: the run is on videos, gives embeddings, or
            runs the model on windows of its images.
    """
    task = run.task()
    if run.has_videos() or isinstance(task, Embeddings):
        given = "videos" if run.has_videos() else "embeddings"
        raise ValueError(f"a cascade needs a run that gives images classes or masks, not {given}.")
    if isinstance(task, DensePrediction) and task.augment.test == "slide":
        raise ValueError(
            "a cascade answers whole images, but augment.test of this run is slide: windows."
        )
    return task


@torch.no_grad()
def _observe(
    cascade: Cascade,
    degrees: Sequence[int],
    loader: DataLoader[Any],
    task: Task,
    harm: Harm,
    *,
    before_batch: Callable[[int], object],
) -> tuple[Observations, dict[int, Tensor]]:
    """What the stages of a cascade do with all images, and the score of each image [N] by degree.

    Args:
        cascade: The cascade.
        degrees: Degrees to score; the cascade's are among them.
        loader: Gives batches of images and targets.
        task: What the model was trained for.
        harm: What counts as a worse answer.
        before_batch: Called with the degree before each forward pass.
    """
    model = cascade.model
    model.eval()
    found: list[Observations] = []
    scores: dict[int, list[Tensor]] = {degree: [] for degree in degrees}
    for images, targets in loader:
        logits = {}
        for degree, listed in scores.items():
            before_batch(degree)
            model.set_degree(degree)
            logits[degree] = task.predict(model, images.to(model.device)).float().cpu()
            listed.append(image_scores(task, logits[degree], targets))
        labels = targets if isinstance(task, Classification) else None
        found.append(cascade.compare([logits[each] for each in cascade.degrees], labels, harm))
    return Observations.joined(found), {each: torch.cat(parts) for each, parts in scores.items()}


def _report(
    cascade: Cascade,
    stages: Tensor,
    scores: dict[int, Tensor],
    gmacs: dict[int, float],
    timings: Sequence[Timing],
    measure: str,
) -> CascadeReport:
    """Compare a calibrated cascade.

    Args:
        cascade: The cascade.
        stages: [N] the stage that answers each image.
        scores: Score of each image [N], by fixed degree.
        gmacs: Cost of an image by fixed degree, in the same order.
        timings: Of the cascade, then of the fixed degrees.
        measure: What the scores are.
    """
    assert cascade.calibration is not None
    of_stages = torch.stack([scores[degree] for degree in cascade.degrees])
    answered = of_stages.gather(0, stages[None])[0]
    shares = stages.bincount(minlength=len(of_stages)) / len(stages)
    last = of_stages[-1]
    cost = mean_gmacs([gmacs[degree] for degree in cascade.degrees], shares.tolist())
    first_row = _row("cascade", answered, last, cost, timings[0])
    rows = {
        degree: _row(f"degree {degree}", scores[degree], last, gmacs[degree], timing)
        for degree, timing in zip(gmacs, timings[1:], strict=True)
    }
    mean_ms = {degree: row.mean_ms for degree, row in rows.items()}
    return CascadeReport(
        degrees="→".join(map(str, cascade.degrees)),
        measure=measure,
        calibration=cascade.calibration,
        rows=[first_row, *(rows[degree] for degree in sorted(rows, reverse=True))],
        minus_fixed=mean_difference(answered, scores_at_time(scores, mean_ms, first_row.mean_ms)),
        minus_random=mean_difference(answered, (shares[:, None] * of_stages).sum(dim=0)),
    )


def mean_gmacs(gmacs: Sequence[float], answered: Sequence[float]) -> float:
    """Mean multiply-accumulates of an image in a cascade, in 1e9.

    Args:
        gmacs: Those of each stage.
        answered: Share of the images that each stage answers; earlier stages have run for these,
            too.
    """
    return sum(share * sum(gmacs[: stage + 1]) for stage, share in enumerate(answered))


@torch.no_grad()
def time_cascade(
    cascade: Cascade, degrees: Sequence[int], batches: Sequence[Tensor]
) -> list[Timing]:
    """Measure a cascade and fixed degrees of its model, which take turns on each batch.

    Args:
        cascade: A calibrated cascade.
        degrees: Degrees that its model offers.
        batches: Batches of images [B, 3, H, W], each of which is one round. Every image should be
            another one, because the cascade takes longer for some than for others.

    Returns:
        The timing of the cascade, and one for each degree.
    """
    model, settings = cascade.model, [None, *degrees]
    batch = itertools.chain.from_iterable(
        itertools.repeat(images, len(settings)) for images in itertools.cycle(batches)
    )

    def prepare(setting: int | None) -> Callable[[], Tensor]:
        images = next(batch).to(cascade.device)
        if setting is None:
            return lambda: cascade(images)
        model.set_degree(setting)
        return lambda: model(images)

    return time_in_rounds(
        settings,
        prepare,
        lambda answer: answer(),
        device=cascade.device,
        seconds=0.0,
        least_rounds=len(batches),
        most_rounds=len(batches),
    )


def _row(name: str, scores: Tensor, last: Tensor, gmacs: float, timing: Timing) -> CascadeRow:
    accuracy = bootstrap_interval(torch.mean, scores)
    return CascadeRow(name, accuracy, mean_difference(scores, last), gmacs, timing)


def scores_at_time(scores: dict[int, Tensor], times: dict[int, float], wanted: float) -> Tensor:
    """Mean score of each image [N] by the best that fixed degrees give within a time.

    That is one degree, or two that share the images so that they take this time. If none is as
    fast, the fastest one answers.

    Args:
        scores: Score of each image [N], by degree.
        times: Mean time of an image by degree, in any unit.
        wanted: Mean time of an image, in the same unit.
    """
    wanted = max(wanted, min(times.values()))
    found = [scores[degree] for degree, time in times.items() if time <= wanted]
    for faster, slower in itertools.permutations(times, 2):
        low, high = times[faster], times[slower]
        if low <= wanted < high:
            share = (wanted - low) / (high - low)
            found.append(share * scores[slower] + (1 - share) * scores[faster])
    return max(found, key=lambda each: float(each.mean()))
