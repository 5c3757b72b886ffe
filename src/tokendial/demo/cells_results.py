"""What the solar-cell demo found: everything that its report tells."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokendial.demo.cells_scores import CellRow, Cells
from tokendial.runs.run import Run
from tokendial.tune.fit_result import FitPoint


@dataclass(frozen=True, slots=True)
class FittedSchedule:
    """A schedule that was fitted to the compute of the highest degree."""

    images: int
    """Training cells that schedules were compared on."""
    found: FitPoint
    """The schedule."""
    right: Tensor
    """[N] float, 0 or 1: whether the model is right on each test cell with it."""


@dataclass(frozen=True, slots=True)
class CellsResults:
    """What the demo found."""

    run: Run
    """The run of the fine-tuned model."""
    cells: Cells
    """The test cells."""
    rows: list[CellRow]
    """The degrees of the dial. The first one is degree 0."""
    compensated: dict[int, Tensor]
    """For some degrees, [N] float, 0 or 1: whether the model is right with the compensator."""
    fitted: FittedSchedule
    """The fitted schedule."""


def five_rows(rows: Sequence[CellRow]) -> list[CellRow]:
    """At most five rows, evenly spread, the first and the last among them."""
    count = min(5, len(rows))
    return [rows[round(number * (len(rows) - 1) / (count - 1))] for number in range(count)]
