"""Contents of plots, read from the figures: points, lines, labels."""

from dataclasses import dataclass

import matplotlib.figure
import numpy as np
import pytest

from tokendial.show.confusion import confusion_figure
from tokendial.show.plots import dial_figure
from tokendial.show.report import png


@dataclass
class Row:
    degree: int
    accuracy: float
    gmacs: float
    images_per_s: float
    spread: float = 0.0


# Degree 2 is slower and less accurate than degree 1.
ROWS = [Row(0, 0.9, 10, 20), Row(1, 0.85, 8, 30), Row(2, 0.8, 6, 25), Row(3, 0.5, 4, 50)]


def frontier(axis):
    (line,) = [line for line in axis.lines if line.get_linestyle() == "-"]
    return sorted(zip(*line.get_data(), strict=True))


def test_the_line_joins_the_degrees_that_no_other_beats():
    cost, speed = dial_figure(ROWS).axes
    assert frontier(speed) == [(20, 90.0), (30, 85.0), (50, 50.0)]
    assert frontier(cost) == [(4, 50.0), (6, 80.0), (8, 85.0), (10, 90.0)]


@pytest.mark.parametrize("count", [1, 4, 40])
def test_labels_lie_within_the_picture_and_name_both_ends(count):
    rows = [Row(d, 0.9 - 0.01 * d, 10 - 0.2 * d, 20 + d) for d in range(count)]
    figure = dial_figure(rows)
    png(figure)  # computes the layout of the figure
    for axis in figure.axes:
        names = [text.get_text() for text in axis.texts]
        assert {"0", str(count - 1)} <= {*names}
        for text in axis.texts:
            assert within(figure, text)


def within(figure: matplotlib.figure.Figure, text) -> bool:
    box = text.get_window_extent().transformed(figure.transFigure.inverted())
    return box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1


def test_a_confusion_matrix_names_classes_counts_and_the_share_that_is_right():
    matrix = np.array([[8, 2], [0, 10]])
    figure = confusion_figure([(0, matrix), (4, matrix)], ["sound", "defective"])
    first, last = figure.axes
    assert last.get_title() == "degree 4: 90.0% right"
    assert [label.get_text() for label in first.get_yticklabels()] == ["sound", "defective"]
    assert sorted(text.get_text() for text in first.texts) == ["10", "2", "8"]
    assert first.images[0].get_array().tolist() == [[0.8, 0.2], [0.0, 1.0]]


def test_many_classes_are_drawn_without_numbers():
    figure = confusion_figure([(0, np.eye(100, dtype=int))], [f"class {n}" for n in range(100)])
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_yticklabels()) <= 40
    png(figure)
