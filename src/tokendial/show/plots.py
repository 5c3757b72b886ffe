"""Plots: accuracy against cost and speed, results of fits, attention diversity by layer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib.figure
from matplotlib.axes import Axes

from tokendial.measure.diversity import LayerDiversity
from tokendial.tune import FitResult


class DialPoint(Protocol):
    """A point of `dial_figure`, such as a row of an evaluation."""

    @property
    def degree(self) -> int:
        """Degree of the dial."""

    @property
    def accuracy(self) -> float:
        """Value of the metric on the vertical axis, in [0, 1]."""

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates for one image, in 1e9."""

    @property
    def images_per_s(self) -> float:
        """Measured images per second."""

    @property
    def spread(self) -> float:
        """Quartile spread of the measured times, as a fraction of their median."""


_POINT, _LINE = "#2b6cb0", "#90cdf4"


def dial_figure(
    rows: Sequence[DialPoint], *, metric: str = "accuracy", title: str = "", unit: str = "image"
) -> matplotlib.figure.Figure:
    """Draw accuracy against multiply-accumulates and against images per second.

    The line joins the degrees that are on the Pareto frontier: no other degree is both cheaper (or
    faster) and more accurate. Horizontal bars show the quartiles of the measured speed.

    Args:
        rows: One point per degree.
        metric: Name of the metric on the vertical axis.
        title: Line above the plots.
        unit: What costs and speeds count: "image" or "clip".
    """
    figure = matplotlib.figure.Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ys = [100 * row.accuracy for row in rows]
    costs, speeds = [row.gmacs for row in rows], [row.images_per_s for row in rows]
    _draw_frontier(left, costs, ys, less_is_better=True)
    _draw_frontier(right, speeds, ys, less_is_better=False)
    errors = [row.images_per_s * row.spread / 2 for row in rows]
    right.errorbar(speeds, ys, xerr=errors, fmt="none", ecolor="#a0aec0", elinewidth=1, zorder=1)
    for axis, label, xs in (
        (left, f"GMACs per {unit} (fewer is cheaper)", costs),
        (right, f"{unit}s per second, measured (more is faster)", speeds),
    ):
        axis.plot(xs, ys, "o", color=_POINT, markersize=6, zorder=3)
        _label_degrees(axis, rows, xs, ys)
        axis.set_xlabel(label)
        axis.margins(x=0.08, y=0.14)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"{metric} (%)")
    left.invert_xaxis()  # so that faster is to the right in both
    figure.suptitle(f"{title} (numbers: degrees of the dial)".strip(), fontsize=11)
    return figure


def _draw_frontier(
    axis: Axes, xs: Sequence[float], ys: Sequence[float], *, less_is_better: bool
) -> None:
    """Draw a line through the points that no other point beats in both coordinates."""
    frontier: list[tuple[float, float]] = []
    # Starting from the best x, a point is on the frontier if its y is higher than all before it.
    order = sorted(
        zip(xs, ys, strict=True), key=lambda p: (p[0] if less_is_better else -p[0], -p[1])
    )
    for x, y in order:
        if not frontier or y > frontier[-1][1]:
            frontier.append((x, y))
    axis.plot(*zip(*frontier, strict=True), "-", color=_LINE, linewidth=2, zorder=2)


def _label_degrees(
    axis: Axes, rows: Sequence[DialPoint], xs: Sequence[float], ys: Sequence[float]
) -> None:
    """Write the degree above each point where there is room; always for the first and the last."""
    width = (max(xs) - min(xs)) or 1.0
    height = (max(ys) - min(ys)) or 1.0
    labelled: list[tuple[float, float]] = []
    ends_first = sorted(range(len(rows)), key=lambda index: index not in (0, len(rows) - 1))
    for index in ends_first:
        x, y = xs[index] / width, ys[index] / height
        if any(
            abs(x - other_x) < 0.05 and abs(y - other_y) < 0.08 for other_x, other_y in labelled
        ):
            continue
        labelled.append((x, y))
        axis.annotate(
            str(rows[index].degree),
            (xs[index], ys[index]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
            color="#2d3748",
        )


class CompensatedPoint(DialPoint, Protocol):
    """A point of `compensator_figure`: `accuracy` is that with the compensator."""

    @property
    def source(self) -> int:
        """Degree that the model was trained at."""

    @property
    def plain(self) -> float:
        """Value of the metric without the compensator, in [0, 1]."""


def compensator_figure(
    rows: Sequence[CompensatedPoint], *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw accuracy against degree and against images per second, without and with a compensator.

    Args:
        rows: The points of all source degrees. Each source degree gets a pair of curves.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, source in enumerate(sorted({row.source for row in rows})):
        of_source = [row for row in rows if row.source == source]
        color = f"C{number}"
        for axis, xs in (
            (left, [float(row.degree) for row in of_source]),
            (right, [row.images_per_s for row in of_source]),
        ):
            # Sorted by x: a higher degree may be slower, and the line must not run back.
            order = sorted(range(len(xs)), key=xs.__getitem__)
            for ys, style, name in (
                ([100 * row.plain for row in of_source], "o:", "plain"),
                ([100 * row.accuracy for row in of_source], "s-", "compensated"),
            ):
                axis.plot(
                    [xs[index] for index in order],
                    [ys[index] for index in order],
                    style,
                    color=color,
                    markersize=4,
                    label=f"trained at {source}, {name}",
                )
    left.set_ylabel("accuracy (%)")
    left.set_xlabel("degree")
    right.set_xlabel("images per second, measured (more is faster)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.margins(x=0.06, y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def fit_figure(result: FitResult, *, title: str = "") -> matplotlib.figure.Figure:
    """Draw agreement with the unreduced model against cost, for all schedules of a search.

    Args:
        result: The result of a fit.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    quantity = "multiply-accumulates" if result.unit == "GMACs" else "time"
    measured = [degree.found for degree in result.degrees]
    for points, style, name, color in (
        (result.searched, ".", "searched", "#cbd5e0"),
        (result.constants, "s-", "constant r", "#c05621"),
        (result.frontier, "-", "frontier", "#2b6cb0"),
        (measured, "*", "fitted, measured", "#2b6cb0"),
    ):
        for axis, ys in (
            (left, [point.divergence for point in points]),
            (right, [100 * point.top1 for point in points]),
        ):
            xs, size = [point.cost for point in points], 9 if style == "*" else 4
            axis.plot(xs, ys, style, color=color, markersize=size, label=name)
    left.set_ylabel(result.divergence_title)
    right.set_ylabel(f"{result.same_title} (%)")
    for axis in (left, right):
        axis.set_xlabel(f"{quantity}, fraction of the unreduced model's")
        axis.grid(alpha=0.3)
    if any(point.divergence > 0 for point in result.searched):
        left.set_yscale("log")
    left.legend(fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def diversity_figure(
    curves: Mapping[str, Sequence[LayerDiversity]], *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw the diversity of attention by layer.

    Args:
        curves: The values of each curve, by its name in the legend.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, layers in curves.items():
        numbers = [layer.layer for layer in layers]
        left.plot(numbers, [layer.distance for layer in layers], "o-", markersize=4, label=name)
        ranks = [layer.effective_rank for layer in layers]
        right.plot(numbers, ranks, "o-", markersize=4, label=name)
    left.set_ylabel("distance between attention rows")
    right.set_ylabel("effective rank of attention")
    for axis in (left, right):
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
