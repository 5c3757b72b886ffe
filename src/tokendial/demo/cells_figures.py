"""Pictures of the solar-cell demo, for readers who do not know how the model works."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokendial.demo.cells_scores import CellRow, Cells
from tokendial.measure import Interval
from tokendial.model.dial_vit import DialViT
from tokendial.show.tokens import input_pixels, paint_tokens, token_maps

GRADES = ("surely sound", "probably sound", "probably defective", "surely defective")
"""What the experts said of a cell, by grade."""
_SIDE = 1.75
"""Width of a picture in a grid, in inches."""
_ACCURACY, _BALANCED, _GREY = "#2b6cb0", "#c05621", "#718096"


def cell_grid(
    cells: Cells, numbers: Sequence[int], captions: Sequence[str], *, columns: int, title: str = ""
) -> Figure:
    """Draw cells in rows, each with a caption.

    Args:
        cells: The test cells.
        numbers: Which of them to draw, at least one.
        captions: Text above each of them.
        columns: Cells in a row.
        title: Line above the grid.
    """
    rows = -(-len(numbers) // columns)
    lines = max(caption.count("\n") for caption in captions) + 1
    height = (_SIDE + 0.18 * lines) * rows + (0.25 if title else 0.0)
    figure = Figure(figsize=(_SIDE * columns, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, number, caption in zip(axes, numbers, captions, strict=False):
        axis.imshow(np.asarray(cells.pictures[number][0]))
        axis.set_title(caption, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def merged_areas_figure(
    model: DialViT, cells: Cells, numbers: Sequence[int], rows: Sequence[CellRow]
) -> Figure:
    """Draw cells with the areas that the model treats as one after half of its layers.

    Args:
        model: The model; its degree is changed.
        cells: The test cells.
        numbers: Which of them to draw, a row for each.
        rows: The degrees to draw, a column for each. The first one merges nothing.
    """
    figure = Figure(
        figsize=(_SIDE * len(rows) + 0.2, (_SIDE + 0.28) * len(numbers)), layout="constrained"
    )
    axes = figure.subplots(len(numbers), len(rows), squeeze=False)
    for line, number in zip(axes, numbers, strict=True):
        batch, place = divmod(number, len(cells.batches[0]))
        image = cells.batches[batch][place]
        pixels = input_pixels(model, image)
        enlarge = max(1, 448 // max(pixels.shape[:2]))  # so that outlines are thin
        pixels = pixels.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        for axis, row in zip(line, rows, strict=True):
            model.set_degree(row.degree)
            origin = token_maps(model, image).origin[half_way(model) - 1]
            axis.imshow(paint_tokens(pixels, origin))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            axis.set_title(
                f"degree {row.degree}: {len(np.unique(origin))} areas\n"
                f"{float(row.probability[number]):.0%} defective",
                fontsize=8,
            )
        line[0].set_ylabel(GRADES[int(cells.grades[number])], fontsize=9)
    return figure


def half_way(model: DialViT) -> int:
    """The layer after which merged areas are drawn. After the last one, few areas are left."""
    return model.anatomy.shape.depth // 2


def dial_with_intervals_figure(rows: Sequence[CellRow]) -> Figure:
    """Draw accuracy and balanced accuracy, with intervals, over compute and measured speed."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    full = rows[0]
    for axis, xs, label in (
        (left, [100 * row.gmacs / full.gmacs for row in rows], "compute (% of degree 0)"),
        (right, [row.images_per_s for row in rows], "pictures per second, measured"),
    ):
        shift = 0.006 * (max(xs) - min(xs))  # so that the bars stand side by side
        for name, color, scores, side in (
            ("of all cells", _ACCURACY, [row.accuracy for row in rows], -shift),
            ("balanced", _BALANCED, [row.balanced_accuracy for row in rows], shift),
        ):
            _draw_intervals(axis, [x + side for x in xs], scores, name, color)
        for x, row in zip(xs, rows, strict=True):
            axis.annotate(
                str(row.degree),
                (x, 100 * row.accuracy.high),
                textcoords="offset points",
                xytext=(0, 3),
                ha="center",
                fontsize=8,
                color=_GREY,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.invert_xaxis()  # so that cheaper and faster are both to the right
    left.set_ylabel("right answers (%)")
    left.legend(fontsize=8, loc="lower left")
    figure.suptitle(
        "small numbers: degrees of the dial; bars: 95% intervals", fontsize=9, color=_GREY
    )
    return figure


def _draw_intervals(
    axis: Axes, xs: Sequence[float], scores: Sequence[Interval], name: str, color: str
) -> None:
    values = [100 * score.value for score in scores]
    below = [100 * (score.value - score.low) for score in scores]
    above = [100 * (score.high - score.value) for score in scores]
    axis.errorbar(
        xs,
        values,
        yerr=[below, above],
        fmt="o-",
        color=color,
        label=name,
        markersize=5,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
    )


def schedules_figure(schedules: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """Draw how many areas are left after each layer.

    Args:
        schedules: Pairs of a name and the areas that are left after each layer, from those that
            enter the first one on.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, areas), color in zip(schedules, (_ACCURACY, _BALANCED), strict=False):
        axis.plot(range(len(areas)), areas, "o-", color=color, markersize=4, label=name)
    axis.set_xlabel("layer of the model (0: the picture)")
    axis.set_ylabel("areas left")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return figure


def compensator_gain_figure(degrees: Sequence[int], gains: Sequence[Interval]) -> Figure:
    """Draw what the compensator changes in accuracy at each degree, with intervals."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color=_GREY, linewidth=1)
    _draw_intervals(axis, [float(degree) for degree in degrees], gains, "", _ACCURACY)
    axis.set_xlabel("degree of the dial")
    axis.set_ylabel("accuracy gained (points)")
    axis.set_xticks(list(degrees))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def most_doubtful(probability: Tensor, chosen: Tensor, count: int, *, highest: bool) -> list[int]:
    """Numbers of at most `count` chosen cells, by the model's probability of a defect.

    Args:
        probability: [N]: the model's probability that each cell is defective.
        chosen: [N] bool: which cells may be taken.
        count: Most cells to take.
        highest: Whether to take those of the highest probability, else of the lowest.
    """
    numbers = chosen.nonzero().flatten()
    order = probability[numbers].argsort(descending=highest, stable=True)
    return [int(number) for number in numbers[order[:count]]]
