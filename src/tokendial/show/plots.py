"""Plots: accuracy against cost and speed along the dial; fits; attention diversity by depth."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib.figure

from tokendial.measure.diversity import LayerDiversity
from tokendial.schedules import Fitted


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


def dial_figure(
    rows: Sequence[DialPoint], *, metric: str = "accuracy", title: str = "", unit: str = "image"
) -> matplotlib.figure.Figure:
    """Draw accuracy against multiply-accumulates and against images per second.

    Args:
        rows: One point per degree.
        metric: Name of what `accuracy` holds.
        title: Line above the plots.
        unit: What the costs are of.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, label, xs in (
        (left, f"GMACs per {unit}", [row.gmacs for row in rows]),
        (right, f"{unit}s / s (measured)", [row.images_per_s for row in rows]),
    ):
        ys = [100 * row.accuracy for row in rows]
        axis.plot(xs, ys, "o-", color="#2b6cb0", markersize=4)
        for row, x, y in zip(rows, xs, ys, strict=True):
            axis.annotate(
                str(row.degree), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.set_ylabel(f"{metric} (%)")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


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
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, source in enumerate(sorted({row.source for row in rows})):
        of_source = [row for row in rows if row.source == source]
        color = f"C{number}"
        for axis, xs in (
            (left, [float(row.degree) for row in of_source]),
            (right, [row.images_per_s for row in of_source]),
        ):
            for ys, style, name in (
                ([100 * row.plain for row in of_source], "o:", "plain"),
                ([100 * row.accuracy for row in of_source], "o-", "compensated"),
            ):
                axis.plot(
                    xs, ys, style, color=color, markersize=4, label=f"trained at {source}, {name}"
                )
    left.set_ylabel("accuracy (%)")
    left.set_xlabel("degree")
    right.set_xlabel("images / s (measured)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def fit_figure(fitted: Fitted, *, title: str = "") -> matplotlib.figure.Figure:
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
