"""Plots of the dial: accuracy against cost and against measured speed."""

from collections.abc import Sequence
from typing import Protocol

import matplotlib.figure


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
    rows: Sequence[DialPoint], *, metric: str = "accuracy", title: str = ""
) -> matplotlib.figure.Figure:
    """Draw accuracy against multiply-accumulates and against images per second.

    Args:
        rows: One point per degree.
        metric: Name of what `accuracy` holds.
        title: Line above the plots.
    """
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, label, xs in (
        (left, "GMACs per image", [row.gmacs for row in rows]),
        (right, "images / s (measured)", [row.images_per_s for row in rows]),
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
