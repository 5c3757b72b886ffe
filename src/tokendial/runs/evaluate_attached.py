"""Evaluation of a model with attached dials: agreement with degree 0, cost and measured speed."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokendial.data.readers.images import (
    count_pictures,
    read_image,
    warn_of_multi_picture_files,
)
from tokendial.measure import Timing, time_in_rounds
from tokendial.measure.agreement import (
    box_agreement,
    class_agreement,
    depth_agreement,
    feature_agreement,
    heat_map_agreement,
    mask_agreement,
)
from tokendial.measure.cost import count_macs_in_parts
from tokendial.measure.neighbours import embedding_scores
from tokendial.model.attach import AttachedDial, attach
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import ProgressCallback, StepCounter, main_score, no_progress
from tokendial.runs.image_model import (
    ImageModel,
    Inputs,
    Output,
    OutputKind,
    join_by_shape,
    move_inputs,
)
from tokendial.tune import DTYPES, Precision

RELATIVE_ERROR = "relative_error"
"""The score of depths, of which less is better."""
_AGREEMENT: dict[OutputKind, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "class_logits": class_agreement,
    "masks": mask_agreement,
    "depth": depth_agreement,
    "heat_maps": heat_map_agreement,
    "boxes": box_agreement,
}
"""Scores of each image by the kind of output. Embeddings are compared by all images together, and
features only where there is no padding."""
_PADDING_MASK = "pixel_attention_mask"
"""Name of the input that is 0 where patches are padding, in models that take patches."""
_NOISE = 0.01
"""Difference between two calls, as a fraction of the largest value, that rounding explains."""
_TIMING_SECONDS = 1.0
"""Time to spend on measuring the speed of each degree."""


@dataclass(frozen=True, slots=True)
class AttachedRow:
    """Agreement with degree 0, cost and speed of a model at one degree of its dials."""

    degree: int
    """Degree of all dials."""
    scores: dict[str, float]
    """Agreement with degree 0 by name, the mean over all images. 1 means equal; of relative_error,
    0 does. The first one is the main score."""
    gmacs: float
    """Multiply-accumulates of the whole call for one image, in 1e9."""
    tower_gmacs: float
    """Multiply-accumulates of the ViTs in the model for one image, in 1e9."""
    images_per_s: float
    """Images per second of the whole call."""
    speedup: float
    """How many times as fast this degree is as the first degree of the evaluation."""
    timing: Timing
    """Measured time of one call. All degrees took turns."""

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
        """The main score as plots show it: more is better, so errors are subtracted from 1."""
        score = main_score(self.scores)
        return 1 - score if RELATIVE_ERROR in self.scores else score


@dataclass(frozen=True, slots=True)
class AttachedEvaluation:
    """What `evaluate_attached` found."""

    rows: tuple[AttachedRow, ...]
    """One row per degree."""
    towers: tuple[str, ...]
    """The ViTs that got a dial: their names in the model, and their classes in brackets."""
    compared: tuple[str, ...]
    """Names of the outputs that were compared, as the model calls them."""
    num_images: int
    """Number of images that were compared."""
    timed_shape: tuple[int, ...]
    """Shape of the batch whose cost and speed were measured: [images, channels, height, width], or
    [images, patches, values] for models that take patches."""


def evaluate_attached(
    source: ImageModel,
    images: Sequence[Path],
    reduce: ReducerConfig,
    degrees: str = "all",
    *,
    towers: Sequence[str] | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
    device: str | None = None,
    progress: ProgressCallback = no_progress,
) -> AttachedEvaluation:
    """Attach dials to the ViTs inside of a model, and compare what it gives with degree 0.

    Cost and speed are those of the first batch of images that have the same size, whatever the
    number of images is. The dials are detached at the end.

    Args:
        source: The model.
        images: Image files.
        reduce: A reduction method without weights, such as `ToMe()`.
        degrees: Degrees as text, such as "0,4,8", "all" or "every"; see `parse_degrees`.
        towers: Names of the ViTs that get a dial, as in `model.named_modules()`. None: all.
        batch_size: Images per call. Images of different sizes are never in one call.
        precision: Floating-point format of weights and activations.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        progress: Called after each batch.

    Raises:
        ValueError: If no ViT in the model is supported, the method does not fit it, a degree is not
            offered, an image cannot be read, or the outputs cannot be compared.
    """
    if not images:
        raise ValueError("images must be at least 1, got 0.")
    warn_of_multi_picture_files((path, count_pictures(path)) for path in images)
    device, dtype = device or default_device(), DTYPES[precision]
    source.model.to(device, dtype).eval()
    with attach(source.model, reduce, towers=towers) as dial, torch.no_grad():
        wanted = degrees_to_show(dial, degrees)
        counter = StepCounter(progress, -(-len(images) // batch_size))
        counter.text = "batches"
        agreement, first = _Agreement(), None
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            for inputs in _batches(source, some, torch.device(device), dtype):
                agreement.compare(source, dial, inputs, wanted)
                first = first or inputs
            counter.step()
        scores = agreement.scores(wanted)
        assert first is not None
        counter.show(f"measuring the speed of {len(wanted)} degrees in turns")
        rows = _rows(source, dial, first, wanted, scores)
        names = tuple(f"{t.name or 'model'} ({type(t.module).__name__})" for t in dial.towers)
    return AttachedEvaluation(
        rows=rows,
        towers=names,
        compared=tuple(agreement.names),
        num_images=len(images),
        timed_shape=tuple(next(iter(first.values())).shape),
    )


def _batches(
    source: ImageModel, files: Sequence[Path], device: torch.device, dtype: torch.dtype
) -> Iterator[Inputs]:
    """Inputs of images, those of one size together."""
    for _, inputs in join_by_shape([source.prepare(read_image(file)) for file in files]):
        yield move_inputs(inputs, device, dtype)


class _Agreement:
    """Compares the outputs of each degree with those of degree 0, batch by batch."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Names of the outputs."""
        self._scores: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
        """Scores of each image by degree and name."""
        self._embeddings: defaultdict[int, list[Tensor]] = defaultdict(list)

    def compare(
        self, source: ImageModel, dial: AttachedDial, inputs: Inputs, degrees: Sequence[int]
    ) -> None:
        """Run the model at each degree, and at 0."""
        dial.set_degree(0)
        first = source.outputs(source.run(inputs))
        if not self.names:
            _check_repeatable(source, inputs, first)
            self.names = [output.name for output in first]
        for degree in {0, *degrees}:
            dial.set_degree(degree)
            found = source.outputs(source.run(inputs)) if degree else first
            for output, reference in zip(found, first, strict=True):
                if output.kind == "embeddings":
                    self._embeddings[degree].append(output.values.float().cpu())
                    continue
                values = output.values, reference.values
                if output.kind == "features":
                    scores = feature_agreement(*values, inputs.get(_PADDING_MASK))
                else:
                    scores = _AGREEMENT[output.kind](*values)
                for name, each in scores.items():
                    self._scores[degree, name].append(each.float().cpu())

    def scores(self, degrees: Sequence[int]) -> list[dict[str, float]]:
        """The mean scores of each degree."""
        names = list(dict.fromkeys(name for _, name in self._scores))
        rows = []
        embeddings = {degree: torch.cat(parts) for degree, parts in self._embeddings.items()}
        for degree in degrees:
            row: dict[str, float] = {}
            if embeddings:
                row |= embedding_scores(embeddings[degree], embeddings[0])
            row |= {name: float(torch.cat(self._scores[degree, name]).mean()) for name in names}
            rows.append(row)
        return rows


def _check_repeatable(source: ImageModel, inputs: Inputs, first: list[Output]) -> None:
    """Raise a ValueError if the model gives another answer when it is called again.

    Models that hide random patches do so; they cannot be compared with themselves.
    """
    again = source.outputs(source.run(inputs))
    for one, other in zip(first, again, strict=True):
        if not one.values.isfinite().all():
            raise ValueError(f"{source.name} gives values of {one.name} that are not finite.")
        if (one.values - other.values).abs().max() > _NOISE * one.values.abs().max():
            raise ValueError(
                f"{source.name} cannot be compared with itself: {one.name} differs between two "
                "calls with the same images."
            )


def _rows(
    source: ImageModel,
    dial: AttachedDial,
    inputs: Inputs,
    degrees: Sequence[int],
    scores: Sequence[dict[str, float]],
) -> tuple[AttachedRow, ...]:
    count = len(next(iter(inputs.values())))
    costs = []
    for degree in degrees:
        dial.set_degree(degree)
        costs.append(
            count_macs_in_parts(lambda: source.run(inputs), [t.module for t in dial.towers])
        )
    timings = time_in_rounds(
        degrees,
        dial.set_degree,
        lambda _: source.run(inputs),
        device=next(iter(inputs.values())).device,
        seconds=_TIMING_SECONDS,
    )
    return tuple(
        AttachedRow(
            degree=degree,
            scores=own,
            gmacs=whole / count / 1e9,
            tower_gmacs=in_towers / count / 1e9,
            images_per_s=count / timing.seconds,
            speedup=timings[0].seconds / timing.seconds,
            timing=timing,
        )
        for degree, own, (whole, in_towers), timing in zip(
            degrees, scores, costs, timings, strict=True
        )
    )
