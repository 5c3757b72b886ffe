"""Which cells the report of the solar-cell demo shows, and its figures of them."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from tokendial.demo.cells_figures import (
    GRADES,
    cell_grid,
    compensator_gain_figure,
    dial_with_intervals_figure,
    merged_areas_figure,
    most_doubtful,
    schedules_figure,
)
from tokendial.demo.cells_results import CellsResults, five_rows
from tokendial.demo.cells_scores import CellRow, Cells
from tokendial.measure import Interval
from tokendial.model.dial_vit import DialViT

_SHOWN, _SHOWN_MERGED = 6, 3
"""Most cells in a row of pictures, and cells whose merged areas are drawn."""


def draw_figures(results: CellsResults, gains: Mapping[int, Interval]) -> dict[str, Figure]:
    """The figures of the report, by the names of their PNG files.

    Args:
        results: What the demo found.
        gains: What the compensator changes in accuracy, by degree.
    """
    cells, rows = results.cells, results.rows
    model = results.run.model()
    figures = {
        "dial": dial_with_intervals_figure(rows),
        "task": _task_figure(cells),
        "areas": merged_areas_figure(model, cells, _cells_to_merge(results), five_rows(rows)),
        "compensator": compensator_gain_figure(list(gains), list(gains.values())),
    }
    figures |= _error_figures(results)
    figures["schedules"] = schedules_figure(
        [
            ("fitted", _areas_left(rows[0].tokens, results.fitted.found.removed)),
            (f"degree {rows[-1].degree}", _areas_of_degree(model, rows[-1].degree)),
        ]
    )
    return figures


def _areas_of_degree(model: DialViT, degree: int) -> list[int]:
    """Areas that enter the first layer, and those that are left after each layer."""
    shape = model.anatomy.shape
    left = model.cost(degree).tokens_per_layer
    return [shape.num_patches, *(count - shape.num_prefix_tokens for count in left)]


def _areas_left(start: int, removed: Sequence[int]) -> list[int]:
    left = [start]
    for number in removed:
        left.append(left[-1] - number)
    return left


def _task_figure(cells: Cells) -> Figure:
    numbers, captions = [], []
    for grade in (0, 3):
        for poly in (False, True):
            kind = (cells.grades == grade) & (cells.poly == poly)
            numbers += kind.nonzero().flatten()[: _SHOWN // 2].tolist()
    captions = [
        f"{GRADES[int(cells.grades[n])]}\n{'poly' if cells.poly[n] else 'mono'}crystalline"
        for n in numbers
    ]
    return cell_grid(cells, numbers, captions, columns=_SHOWN)


def _cells_to_merge(results: CellsResults) -> list[int]:
    """A sound and two defective cells that the model is sure of: what it sees is typical there."""
    cells, probability = results.cells, results.rows[0].probability
    sound = most_doubtful(probability, cells.grades == 0, 1, highest=False)
    defective = most_doubtful(probability, cells.grades == 3, 2, highest=True)
    return (sound + defective)[:_SHOWN_MERGED]


def _error_figures(results: CellsResults) -> dict[str, Figure]:
    """Pictures of wrong answers; without those of which there are none."""
    cells, rows = results.cells, results.rows
    full = rows[0]
    figures = {}
    missed = most_doubtful(
        full.probability, cells.defective & ~full.called_defective, _SHOWN // 2, highest=False
    )
    alarms = most_doubtful(
        full.probability, ~cells.defective & full.called_defective, _SHOWN // 2, highest=True
    )
    if missed or alarms:
        figures["errors"] = cell_grid(
            cells,
            missed + alarms,
            [
                f"{GRADES[int(cells.grades[n])]}\nmodel: {float(full.probability[n]):.0%} defective"
                for n in missed + alarms
            ],
            columns=_SHOWN,
            title="Wrong at full compute: defects that are missed, and false alarms",
        )
    first = _first_missed(results)
    if first:
        figures["missed"] = cell_grid(
            cells,
            [number for number, _ in first],
            [
                f"missed from degree {row.degree} on\n{float(full.probability[n]):.0%} at 0, "
                f"{float(row.probability[n]):.0%} at {row.degree}"
                for n, row in first
            ],
            columns=_SHOWN,
            title="Found at full compute, and missed first as the degree rises",
        )
    return figures


def _first_missed(results: CellsResults) -> list[tuple[int, CellRow]]:
    """Defects that are found at degree 0, and the degree from which on they are missed.

    Those that are missed from a low degree on come first.
    """
    cells, rows = results.cells, results.rows
    found = rows[0].called_defective & cells.defective
    missed: list[tuple[int, CellRow]] = []
    for index, row in enumerate(rows[1:], start=1):
        later = torch.stack([other.called_defective for other in rows[index:]]).any(dim=0)
        lost = found & ~later
        missed += [(n, row) for n in most_doubtful(row.probability, lost, _SHOWN, highest=False)]
        found &= ~lost
    return missed[:_SHOWN]
