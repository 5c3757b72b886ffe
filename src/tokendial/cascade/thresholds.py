"""The choice of a cascade's thresholds, with a bound on what the cheap degrees do worse."""

# Shape legend: E early stages, N images.

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokendial.cascade.bound import largest_share, smallest_sample, smallest_share

_CHOOSING = 0.2
"""Share of the images that candidates are made from; the bound is counted on the others."""
_CANDIDATES = 100
Harm = Literal["changed", "lost"]


@dataclass(frozen=True, slots=True)
class Observations:
    """What the early stages of a cascade would do with each of some images."""

    sure: Tensor
    """[E, N] how sure each early stage is of its answer."""
    harmed: Tensor
    """[E, N] bool: whether that answer is worse than the last stage's: another one, or wrong where
    the last one is right."""

    def stage_of(self, thresholds: tuple[float, ...]) -> Tensor:
        """[N] the stage whose answer each image gets; E is the last stage."""
        limits = torch.tensor(thresholds, dtype=self.sure.dtype)[:, None]
        answered = torch.cat([self.sure >= limits, torch.ones(1, self.sure.shape[1]).bool()])
        return answered.int().argmax(dim=0)

    def is_harmed(self, thresholds: tuple[float, ...]) -> Tensor:
        """[N] bool: whether each image gets a worse answer than the last stage's."""
        last = torch.zeros(1, self.harmed.shape[1], dtype=torch.bool)
        return torch.cat([self.harmed, last]).gather(0, self.stage_of(thresholds)[None])[0]

    def of(self, images: Tensor) -> "Observations":
        """The same for some of the images."""
        return Observations(self.sure[:, images], self.harmed[:, images])

    @classmethod
    def joined(cls, batches: Sequence["Observations"]) -> "Observations":
        """Those of several batches of images, in their order."""
        sure = torch.cat([each.sure for each in batches], dim=1)
        return cls(sure, torch.cat([each.harmed for each in batches], dim=1))


@dataclass(frozen=True, slots=True)
class CascadeCalibration:
    """Thresholds of a cascade, and what is known of them."""

    thresholds: tuple[float, ...]
    """How sure each stage but the last must be to answer. Infinity: it never answers."""
    harm: Harm
    """What is bounded. changed: the answer is another one than the last stage's. lost: it is wrong
    where the last stage's is right."""
    allowed: float
    """The largest share of images that may be harmed."""
    confidence: float
    """Probability, over the draw of the images, with which the bound holds."""
    images: int
    """Number of images on which harm was counted."""
    harmed: int
    """How many of them get a worse answer."""
    bound: float
    """Upper bound of the share of harmed images; at most `allowed`."""
    sent_on: tuple[float, ...]
    """Share of the images that reach each stage after the first."""
    sent_on_range: tuple[tuple[float, float], ...]
    """Interval of each of these shares in other images of the same kind. A share outside of it
    means that the images have changed, and that the bound says nothing about them."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON, which has no infinity: null stands for it."""
        fields = dataclasses.asdict(self)
        return fields | {
            "thresholds": [None if math.isinf(value) else value for value in self.thresholds]
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CascadeCalibration":
        """Read what `to_json` wrote.

        Raises:
            ValueError: If fields are missing or unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if fields.keys() != known:
            wrong = sorted(fields.keys() ^ known)[0]
            raise ValueError(f"calibration: {wrong} is missing, or no field of a calibration.")
        thresholds = [math.inf if value is None else value for value in fields["thresholds"]]
        ranges = tuple((low, high) for low, high in fields["sent_on_range"])
        changed = {
            "thresholds": tuple(thresholds),
            "sent_on": tuple(fields["sent_on"]),
            "sent_on_range": ranges,
        }
        return cls(**(dict(fields) | changed))


def read_promise(max_changed: float | None, max_lost: float | None) -> tuple[Harm, float]:
    """Return what is bounded, and the largest share. A ValueError unless exactly one is given."""
    if max_changed is not None and max_lost is None:
        return "changed", max_changed
    if max_lost is not None and max_changed is None:
        return "lost", max_lost
    raise ValueError("a cascade needs either max_changed or max_lost.")


def check_promise(harm: Harm, allowed: float, confidence: float, count: int) -> None:
    """Raise a ValueError if a number is out of range, or `count` images cannot show the bound."""
    for name, value in ((f"max_{harm}", allowed), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie in (0, 1), got {value}.")
    needed, choosing = smallest_sample(allowed, confidence), round(_CHOOSING * count)
    if count - choosing < needed or not choosing:
        whole = math.ceil(needed / (1 - _CHOOSING)) + 1
        raise ValueError(
            f"max_{harm} {allowed:g} at confidence {confidence:g} needs at least {whole} images to "
            f"calibrate on, got {count}."
        )


def choose_thresholds(
    observations: Observations,
    harm: Harm,
    allowed: float,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> CascadeCalibration:
    """Choose the thresholds that send on the fewest images within a bound on harmed ones.

    Candidates are made from a fifth of the images: each lets every early stage answer some percent
    of those it is surest of. On the other images they are tried from 0 percent on, in this order,
    until the upper bound of harmed images exceeds what is allowed. The order does not depend on
    these images, so the bound of the last candidate before holds at the given confidence.

    Args:
        observations: What the early stages do with the images.
        harm: What `observations.harmed` says.
        allowed: Largest share of harmed images, in (0, 1).
        confidence: Probability with which the bound is to hold, in (0, 1).
        seed: Seed of the split.

    Raises:
        ValueError: If a number is out of range, or there are too few images to show the bound.

    Source:
        Fixed-sequence testing: Angelopoulos et al., "Learn then Test" (arXiv 2110.01052).
    """
    count = observations.sure.shape[1]
    check_promise(harm, allowed, confidence, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    choosing, counting = order.tensor_split([round(_CHOOSING * count)])
    surest_first = observations.of(choosing).sure.sort(dim=1, descending=True).values
    counted = observations.of(counting)
    never = (math.inf,) * len(observations.sure)
    best, best_bound = never, largest_share(0, len(counting), confidence)
    for step in range(1, _CANDIDATES + 1):
        place = math.ceil(step / _CANDIDATES * len(choosing)) - 1
        thresholds = tuple(surest_first[:, place].tolist())
        harmed = int(counted.is_harmed(thresholds).sum())
        bound = largest_share(harmed, len(counting), confidence)
        if bound > allowed:
            break
        best, best_bound = thresholds, bound
    stages = counted.stage_of(best)
    reached = [int((stages >= stage).sum()) for stage in range(1, len(never) + 1)]
    half = (1 + confidence) / 2
    return CascadeCalibration(
        thresholds=best,
        harm=harm,
        allowed=allowed,
        confidence=confidence,
        images=len(counting),
        harmed=int(counted.is_harmed(best).sum()),
        bound=best_bound,
        sent_on=tuple(number / len(counting) for number in reached),
        sent_on_range=tuple(
            (
                smallest_share(number, len(counting), half),
                largest_share(number, len(counting), half),
            )
            for number in reached
        ),
    )
