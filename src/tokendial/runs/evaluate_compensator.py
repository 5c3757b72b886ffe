"""Evaluation of runs with a compensator: accuracy without and with it, cost and speed."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokendial.compensate import Compensator
from tokendial.measure import Timing
from tokendial.model.dial_vit import DialViT
from tokendial.runs.compensated import load_to_compensate
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import (
    ProgressCallback,
    StepCounter,
    evaluate_loader,
    first_images,
    main_score,
    no_progress,
    time_degrees,
    validation_set,
)
from tokendial.runs.run import Run


@dataclass(frozen=True, slots=True)
class CompensatedRow:
    """A run at one degree of the dial, without and with a compensator."""

    run: str
    """Folder of the run."""
    source: int
    """Degree that the run was trained at."""
    degree: int
    """Degree that the run is evaluated at: the target of the compensator."""
    plain: float
    """Value of the task's main metric without the compensator, in [0, 1]."""
    accuracy: float
    """Value of the task's main metric with the compensator, in [0, 1]."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9. The compensator does not change them."""
    images_per_s: float
    """Images per second of the forward pass with the compensator, at the batch size of the
    evaluation."""
    timing: Timing
    """Measured time of one forward pass with the compensator. All degrees of a run took turns."""
    tokens: int
    """Tokens, prefix tokens included, that leave the last layer."""

    @property
    def spread(self) -> float:
        """Quartile spread of the measured times, as a fraction of their median."""
        return self.timing.spread

    @property
    def disturbed(self) -> bool:
        """Whether the times differ too much to be trusted: another program used the machine."""
        return self.timing.disturbed


def evaluate_compensator(
    runs: Sequence[Run],
    compensator: Compensator,
    degrees: str = "all",
    *,
    sources: Sequence[int] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: ProgressCallback = no_progress,
) -> list[CompensatedRow]:
    """Evaluate every run at every degree, without and with a compensator.

    The rows are the grid of source and target degrees that the ToCom paper reports.

    Args:
        runs: Runs of models that were fine-tuned from the compensator's backbone. A run that was
            trained without reduction gets the compensator's reduction method, and source 0.
        compensator: The compensator.
        degrees: Target degrees as text, such as "0..16"; see `parse_degrees`.
        sources: The degree that each run was trained at. None reads it from each run.
        batch_size: Images per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        progress: Called after each batch.

    Returns:
        The rows of the first run, one per degree, then those of the next run.

    Raises:
        ValueError: If a run has no model, the compensator does not fit a run, a degree is not
            offered, or the number of sources is not the number of runs.
    """
    if sources is not None and len(sources) != len(runs):
        raise ValueError(
            f"sources must be one degree for each of the {len(runs)} runs, got {len(sources)}."
        )
    on = device or default_device()
    compensator = compensator.to(on).eval()
    rows: list[CompensatedRow] = []
    for number, run in enumerate(runs):
        model = load_to_compensate(run, compensator).to(on)
        source = model.degree if sources is None else sources[number]
        targets = degrees_to_show(model, degrees, model.degrees[: compensator.steps + 1])
        rows += _rows_of_run(run, model, compensator, source, targets, batch_size, progress)
    return rows


def _rows_of_run(
    run: Run,
    model: DialViT,
    compensator: Compensator,
    source: int,
    degrees: Sequence[int],
    batch_size: int,
    progress: ProgressCallback,
) -> list[CompensatedRow]:
    """The rows of one run: all degrees run without the compensator first, then all with it."""
    task, loader = validation_set(run, model, batch_size)
    images = first_images(loader, model, batch_size)
    counter = StepCounter(progress, 2 * len(degrees) * len(loader))

    def accuracy(degree: int) -> float:
        model.set_degree(degree)
        counter.text = f"degree {degree}"
        return main_score(evaluate_loader(model, loader, task, after_batch=counter.step))

    plain = list(map(accuracy, degrees))
    compensator.attach(model, source)
    try:
        compensated = list(map(accuracy, degrees))
        counter.show(f"measuring the speed of {len(degrees)} degrees in turns")
        timings = time_degrees(model, images, degrees)
    finally:
        compensator.detach(model)
    rows = []
    for index, degree in enumerate(degrees):
        cost = model.cost(degree)
        rows.append(
            CompensatedRow(
                run=run.recipe().output,
                source=source,
                degree=degree,
                plain=plain[index],
                accuracy=compensated[index],
                gmacs=cost.gmacs,
                images_per_s=len(images) / timings[index].seconds,
                timing=timings[index],
                tokens=cost.tokens_per_layer[-1],
            )
        )
    return rows
