"""What a fit has found: a method whose degrees keep to budgets, and how that was measured."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokendial.measure.timing import DISTURBED
from tokendial.methods import to_json
from tokendial.reduce import EViT, ToMe
from tokendial.tune.block_costs import CostTable
from tokendial.tune.schedules import Schedule

_MISSED = 0.05
"""Distance from the budget, as a fraction of it, that is worth a warning."""


@dataclass(frozen=True, slots=True)
class FitPoint:
    """A schedule that was judged on the images of the fit."""

    removed: Schedule
    """Patch tokens that each layer removes."""
    cost: float
    """Share of the cost of the model that removes nothing: by the table, or measured."""
    divergence: float
    """Kullback-Leibler divergence from the model that removes nothing, mean over images, in
    nats."""
    top1: float
    """Share of images (of labels, where there are many) with the same answer as it gives."""

    @property
    def speedup(self) -> float:
        """Over the model that removes nothing."""
        return 1.0 / self.cost


@dataclass(frozen=True, slots=True)
class FittedDegree:
    """A degree of the dial, made for a budget."""

    degree: int
    """Its number."""
    budget: float
    """What was asked for."""
    found: FitPoint
    """Its schedule, with the cost that was measured end to end."""
    constant: FitPoint | None
    """The mildest constant schedule that costs no more, measured in turn with it; None: none."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """The result of a fit."""

    reduce: ToMe | EViT
    """The method with the schedules as its degrees 1, 2, ...: a value for `wrap` and `load`."""
    kind: str
    """Of the budgets: speedup, latency_ms or gmacs."""
    unreduced: float
    """Cost of the model that removes nothing: ms of a batch, or GMACs of an image."""
    batch_size: int
    """Images of a batch."""
    images: int
    """Images that schedules were judged on."""
    degrees: tuple[FittedDegree, ...]
    """From the mildest budget to the hardest."""
    searched: tuple[FitPoint, ...]
    """Every schedule that was judged, with its cost by the table."""
    constants: tuple[FitPoint, ...]
    """Constant schedules among them, the mildest first."""
    table: CostTable
    """Costs of blocks."""
    spread: float
    """Largest quartile spread of the times in the final comparison, see `Timing`; 0 if counted."""

    @property
    def unit(self) -> str:
        """Of `unreduced`."""
        return "GMACs" if self.kind == "gmacs" else "ms"

    def share(self, budget: float) -> float:
        """What a budget allows, as a share of the cost of the model that removes nothing."""
        return 1 / budget if self.kind == "speedup" else budget / self.unreduced

    def warnings(self) -> list[str]:
        """What to know before the result is used, a line each; empty if all went well."""
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
        if self.spread > DISTURBED:
            lines.append(
                f"times differed by {self.spread:.0%} between passes, so something else used the "
                "machine: fit again when it is idle, or with more minutes."
            )
        return lines

    @property
    def frontier(self) -> tuple[FitPoint, ...]:
        """The searched points that none beats in both, from cheap to dear."""
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
