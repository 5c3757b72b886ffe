"""Plots: accuracy against cost and speed along the dial; fits; attention diversity by depth."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib.figure
from matplotlib.axes import Axes

from tokendial.measure.diversity import LayerDiversity
from tokendial.tune import FitResult


class DialPoint(Protocol):
    """What a row of an evaluation must have to be drawn."""

    @property
    def degree(self) -> int:
        """Degree of the dial."""

    @property
    def accuracy(self) -> float:
        """Accuracy in [0, 1]."""

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates for one image, in 1e9."""

    @property
    def images_per_s(self) -> float:
        """Measured throughput."""

    @property
    def spread(self) -> float:
        """Quartile spread of the measured times, as a fraction of their median."""


_POINT, _LINE = "#2b6cb0", "#90cdf4"


def dial_figure(
    rows: Sequence[DialPoint], *, metric: str = "accuracy", title: str = "", unit: str = "image"
) -> matplotlib.figure.Figure:
    """Draw accuracy against multiply-accumulates and against images per second.

    The line joins the degrees that no other beats in both; beside it lie those that it is better
    not to use. Horizontal bars are the quartiles of the measured speed.

    Args:
        rows: One point per degree.
        metric: Name of what `accuracy` holds.
        title: Line above the plots.
        unit: What the costs are of.
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
    """Join the points that no other point beats in both directions."""
    best: list[tuple[float, float]] = []
    # From the fastest on: a slower point is of use only if it is more accurate.
    order = sorted(
        zip(xs, ys, strict=True), key=lambda p: (p[0] if less_is_better else -p[0], -p[1])
    )
    for x, y in order:
        if not best or y > best[-1][1]:
            best.append((x, y))
    axis.plot(*zip(*best, strict=True), "-", color=_LINE, linewidth=2, zorder=2)


def _label_degrees(
    axis: Axes, rows: Sequence[DialPoint], xs: Sequence[float], ys: Sequence[float]
) -> None:
    """Write the degree beside each point that has room for it; the first and the last always."""
    wide = (max(xs) - min(xs)) or 1.0
    high = (max(ys) - min(ys)) or 1.0
    places: list[tuple[float, float]] = []
    for place in sorted(range(len(rows)), key=lambda place: place not in (0, len(rows) - 1)):
        here = (xs[place] / wide, ys[place] / high)
        if any(abs(here[0] - x) < 0.05 and abs(here[1] - y) < 0.08 for x, y in places):
            continue
        places.append(here)
        axis.annotate(
            str(rows[place].degree),
            (xs[place], ys[place]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
            color="#2d3748",
        )


class BridgedPoint(DialPoint, Protocol):
    """A row of an evaluation without and with a compensator."""

    @property
    def source(self) -> int:
        """Degree that the model was trained at."""

    @property
    def plain(self) -> float:
        """Accuracy without the compensator, in [0, 1]."""


def bridged_figure(rows: Sequence[BridgedPoint], *, title: str = "") -> matplotlib.figure.Figure:
    """Draw accuracy against degree and against images per second, without and with a compensator.

    Args:
        rows: The points of all sources; one pair of curves for each.
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
            # From left to right: where a higher degree is no faster, the line does not run back.
            order = sorted(range(len(xs)), key=xs.__getitem__)
            for ys, style, name in (
                ([100 * row.plain for row in of_source], "o:", "plain"),
                ([100 * row.accuracy for row in of_source], "s-", "compensated"),
            ):
                axis.plot(
                    [xs[place] for place in order],
                    [ys[place] for place in order],
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


def fit_figure(fitted: FitResult, *, title: str = "") -> matplotlib.figure.Figure:
    """Draw agreement with the unreduced model against cost: searched schedules, constant ones.

    Args:
        fitted: What a fit has found.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    of = "multiply-accumulates" if fitted.unit == "GMACs" else "time"
    found = [degree.found for degree in fitted.degrees]
    for points, style, name, color in (
        (fitted.searched, ".", "searched", "#cbd5e0"),
        (fitted.constants, "s-", "constant r", "#c05621"),
        (fitted.frontier, "-", "frontier", "#2b6cb0"),
        (found, "*", "fitted, measured", "#2b6cb0"),
    ):
        for axis, ys in (
            (left, [point.divergence for point in points]),
            (right, [100 * point.top1 for point in points]),
        ):
            xs, size = [point.cost for point in points], 9 if style == "*" else 4
            axis.plot(xs, ys, style, color=color, markersize=size, label=name)
    left.set_ylabel("divergence (nats)")
    right.set_ylabel("same answer (%)")
    for axis in (left, right):
        axis.set_xlabel(f"{of}, share of the unreduced model's")
        axis.grid(alpha=0.3)
    if any(point.divergence > 0 for point in fitted.searched):
        left.set_yscale("log")
    left.legend(fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def diversity_figure(
    curves: Mapping[str, Sequence[LayerDiversity]], *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw the diversity of attention by depth, one curve for each setting.

    Args:
        curves: What to call each curve, and its layers.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, layers in curves.items():
        depth = [layer.layer for layer in layers]
        left.plot(depth, [layer.distance for layer in layers], "o-", markersize=4, label=name)
        ranks = [layer.effective_rank for layer in layers]
        right.plot(depth, ranks, "o-", markersize=4, label=name)
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
