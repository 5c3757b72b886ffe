"""The result of `fit`: a method whose degrees keep to budgets, and what was measured."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokendial.measure.timing import DISTURBED_SPREAD
from tokendial.methods import to_json
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.tune.agreement import COMPARISONS, AgreeBy
from tokendial.tune.block_costs import CostTable
from tokendial.tune.schedules import Schedule

_MISSED = 0.05
"""A cost that is off its budget by more than this fraction gives a warning."""


@dataclass(frozen=True, slots=True)
class FitPoint:
    """A schedule, its cost, and its agreement with the unreduced model."""

    removed: Schedule
    """Number of patch tokens that each layer removes."""
    cost: float
    """Cost as a fraction of the unreduced cost: measured, or by the cost table."""
    divergence: float
    """Distance from the unreduced model, mean over images. By logits and masks: Kullback-Leibler
    divergence in nats. By embeddings and feature maps: 1 - cosine similarity. By neighbours: the
    fraction of nearest neighbours that change."""
    top1: float
    """What stays the same, in [0, 1]. By logits: fraction of images (of labels, if multi-label)
    with the unreduced model's answer. By embeddings and neighbours: fraction of the nearest
    neighbours. By feature maps: cosine similarity. By masks: intersection over union of binary
    masks, or fraction of pixels with the same class."""

    @property
    def speedup(self) -> float:
        """Speed as a multiple of the unreduced model's."""
        return 1.0 / self.cost


@dataclass(frozen=True, slots=True)
class FittedDegree:
    """A degree of the dial that was found for a budget."""

    degree: int
    """Number of the degree."""
    budget: float
    """The requested budget."""
    found: FitPoint
    """The schedule of this degree, with its cost measured end to end."""
    constant: FitPoint | None
    """The mildest schedule with the same number in each layer that costs no more, measured in turn
    with `found`. None if there is none."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """The result of a fit."""

    reduce: ScheduledConfig
    """The method whose degrees 1, 2, ... are the found schedules. Pass it to `wrap` or `load`."""
    kind: str
    """Kind of the budgets: speedup, latency_ms or gmacs."""
    unreduced: float
    """Cost of the unreduced model: milliseconds per batch, or GMACs per image."""
    batch_size: int
    """Images per batch."""
    images: int
    """Number of images that the search compared schedules on."""
    images_judged: int
    """Number of images that `degrees` and `constants` were compared on; images of the search only
    where there were too few others."""
    degrees: tuple[FittedDegree, ...]
    """The found degrees, from the mildest budget to the hardest."""
    searched: tuple[FitPoint, ...]
    """Every schedule that the search compared, with its cost by the table."""
    constants: tuple[FitPoint, ...]
    """Schedules with the same number in each layer, the mildest first."""
    table: CostTable
    """The measured costs of blocks."""
    spread: float
    """Largest quartile spread of the times in the final comparison, see `Timing`. 0 for gmacs."""
    agree_by: AgreeBy = "logits"
    """What schedules were compared by: logits, embeddings, neighbours, feature_map or masks."""

    @property
    def unit(self) -> str:
        """Unit of `unreduced`: GMACs or ms."""
        return "GMACs" if self.kind == "gmacs" else "ms"

    @property
    def divergence_title(self) -> str:
        """What `FitPoint.divergence` is here, such as "divergence (nats)" or "1 - cosine"."""
        return COMPARISONS[self.agree_by].divergence_title

    @property
    def same_title(self) -> str:
        """What `FitPoint.top1` is here, such as "same answer" or "same neighbours"."""
        return COMPARISONS[self.agree_by].same_title

    def share(self, budget: float) -> float:
        """Cost that a budget allows, as a fraction of the unreduced model's."""
        return 1 / budget if self.kind == "speedup" else budget / self.unreduced

    def warnings(self) -> list[str]:
        """Warnings about missed budgets and disturbed measurements, a line each."""
        lines = []
        for row in self.degrees:
            over = row.found.cost / self.share(row.budget) - 1
            if over > _MISSED:
                lines.append(f"degree {row.degree} misses its budget by {over:.0%}.")
            elif over < -_MISSED:
                lines.append(
                    f"degree {row.degree} stays {-over:.0%} below its budget, at "
                    f"{row.found.speedup:.2f} times the speed of degree 0: no schedule nearer to "
                    "the budget was found."
                )
        if self.spread > DISTURBED_SPREAD:
            lines.append(
                f"times differed by {self.spread:.0%} between passes, so something else used the "
                "machine: fit again when it is idle, or with more minutes."
            )
        return lines

    @property
    def frontier(self) -> tuple[FitPoint, ...]:
        """Searched points that no other one beats in both cost and divergence, cheapest first."""
        best: list[FitPoint] = []
        for point in sorted(self.searched, key=lambda point: (point.cost, point.divergence)):
            if not best or point.divergence < best[-1].divergence:
                best.append(point)
        return tuple(best)

    def to_json(self) -> dict[str, Any]:
        """Plain-JSON form."""
        table = self.table
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {
            "reduce": to_json("reduce", self.reduce),
            "degrees": [dataclasses.asdict(degree) for degree in self.degrees],
            "searched": [dataclasses.asdict(point) for point in self.searched],
            "constants": [dataclasses.asdict(point) for point in self.constants],
            "frontier": [dataclasses.asdict(point) for point in self.frontier],
            "table": {
                "base": table.base,
                "block": dict(sorted(table.block.items())),
                "step": dict(sorted(table.step.items())),
                "ffn_per_token": table.ffn,
            },
        }
