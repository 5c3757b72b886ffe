"""Which classes are taken for which: confusion matrices as pictures."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

_MOST_NUMBERS = 16
"""With more classes than this, numbers in the cells could not be read."""
_MOST_NAMES = 40
_LONGEST_NAME = 18


def confusion_figure(
    matrices: Sequence[tuple[int, np.ndarray]], classes: Sequence[str], *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw confusion matrices side by side, one for each degree.

    Colours are fractions of each true class, so that small classes are seen as well as large ones;
    numbers are images.

    Args:
        matrices: Degree and [classes, classes] images of each true class (row) that were given each
            class (column).
        classes: Their names.
        title: Line above the matrices.
    """
    side = min(9.0, 2.6 + 0.45 * len(classes))
    figure = matplotlib.figure.Figure(
        figsize=((side + 0.4) * len(matrices), side + 0.3), layout="constrained"
    )
    axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axis, (degree, matrix) in zip(axes, matrices, strict=True):
        _draw(axis, matrix, classes)
        right = matrix.trace() / max(matrix.sum(), 1)
        axis.set_title(f"degree {degree}: {right:.1%} right", fontsize=11)
        axis.set_xlabel("called")
    axes[0].set_ylabel("true class")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw(axis: Axes, matrix: np.ndarray, classes: Sequence[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    every = -(-len(classes) // _MOST_NAMES)
    shown = range(0, len(classes), every)
    names = [_shortened(classes[number]) for number in shown]
    axis.set_xticks(list(shown), names, rotation=90, fontsize=8)
    axis.set_yticks(list(shown), names, fontsize=8)
    if len(classes) > _MOST_NUMBERS:
        return
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if shares[row, column] > 0.5 else "#2d3748"
            axis.text(
                column, row, str(int(count)), ha="center", va="center", fontsize=9, color=color
            )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
