"""Figures of confusion matrices."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

_MAX_CLASSES_WITH_COUNTS = 16
"""With more classes the counts in the cells would be too small to read."""
_MAX_NAMES = 40
"""With more classes not every class is named on the axes."""
_MAX_NAME_LENGTH = 18


def confusion_figure(
    matrices: Sequence[tuple[int, np.ndarray]], classes: Sequence[str], *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw confusion matrices side by side, one for each degree.

    The colour of a cell is a fraction of its true class, so that small classes stand out as well as
    large ones. The number in a cell is a count of images.

    Args:
        matrices: Pairs of a degree and its confusion matrix [classes, classes]: images of each true
            class (row) by predicted class (column).
        classes: Names of the classes.
        title: Line above the matrices.
    """
    side = min(9.0, 2.6 + 0.45 * len(classes))
    figure = matplotlib.figure.Figure(
        figsize=((side + 0.4) * len(matrices), side + 0.3), layout="constrained"
    )
    axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axis, (degree, matrix) in zip(axes, matrices, strict=True):
        _draw_matrix(axis, matrix, classes)
        right = matrix.trace() / max(matrix.sum(), 1)
        axis.set_title(f"degree {degree}: {right:.1%} right", fontsize=11)
        axis.set_xlabel("predicted class")
    axes[0].set_ylabel("true class")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_matrix(axis: Axes, matrix: np.ndarray, classes: Sequence[str]) -> None:
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    step = -(-len(classes) // _MAX_NAMES)
    shown = range(0, len(classes), step)
    names = [_shorten(classes[number]) for number in shown]
    axis.set_xticks(list(shown), names, rotation=90, fontsize=8)
    axis.set_yticks(list(shown), names, fontsize=8)
    if len(classes) > _MAX_CLASSES_WITH_COUNTS:
        return
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if fractions[row, column] > 0.5 else "#2d3748"
            axis.text(
                column, row, str(int(count)), ha="center", va="center", fontsize=9, color=color
            )


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…"
