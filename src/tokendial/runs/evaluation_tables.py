"""Results of an evaluation as CSV files, per degree and per class."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.measure import Timing
from tokendial.runs.evaluate import DegreeRow
from tokendial.runs.evaluate_attached import AttachedRow
from tokendial.runs.evaluate_cascade import AnsweredRow
from tokendial.runs.evaluate_compensator import CompensatedRow

EvaluatedRow = DegreeRow | CompensatedRow | AttachedRow | AnsweredRow
"""A row of any evaluation."""


def write_rows(rows: Sequence[EvaluatedRow], path: Path) -> None:
    """Write the rows of an evaluation as CSV, one line per degree."""
    _write_csv([_columns(row) for row in rows], path)


def write_classes(rows: Sequence[DegreeRow], classes: Sequence[str], path: Path) -> None:
    """Write recall and precision of each class at each degree as CSV.

    Args:
        rows: Rows of an evaluation with confusion matrices.
        classes: Names of the classes, in the order of the logits.
        path: The file.
    """
    table = [
        {"degree": row.degree, "class": scores.name, "images": scores.images}
        | {"recall": _short(scores.recall), "precision": _short(scores.precision)}
        | {"mistaken_for": scores.mistaken_for or "", "times": scores.times}
        for row in rows
        for scores in class_scores(row, classes)
    ]
    _write_csv(table, path)


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Recall and precision of one class at one degree."""

    name: str
    """Name of the class."""
    images: int
    """Images of this class in the validation set."""
    recall: float
    """Fraction of the images of this class that the model assigned to it. NaN if it has none."""
    precision: float
    """Fraction of the images assigned to this class that belong to it. NaN if there are none."""
    mistaken_for: str | None
    """The wrong class that images of this class were assigned to most often. None if all were
    right."""
    times: int
    """Images of this class that were assigned to `mistaken_for`."""


def class_scores(row: DegreeRow, classes: Sequence[str]) -> list[ClassScores]:
    """Recall and precision of each class. Empty if the row has no confusion matrix."""
    if row.confusion is None:
        return []
    confusion = row.confusion.cpu().double()
    right, true_counts, predicted_counts = (
        confusion.diagonal(),
        confusion.sum(1),
        confusion.sum(0),
    )
    wrong = confusion - right.diag()
    times, other = wrong.max(dim=1)
    return [
        ClassScores(
            name=name,
            images=int(true_counts[index]),
            recall=float(right[index] / true_counts[index]),
            precision=float(right[index] / predicted_counts[index]),
            mistaken_for=classes[int(other[index])] if times[index] else None,
            times=int(times[index]),
        )
        for index, name in enumerate(classes)
    ]


def _columns(row: EvaluatedRow) -> dict[str, Any]:
    """The columns of a row: one per score, numbers with six digits, no confusion matrix."""
    columns: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, dict):
            columns |= {name: _short(score) for name, score in value.items()}
        elif isinstance(value, Timing):
            columns |= {
                "batch_ms": _short(1e3 * value.seconds),
                "batch_ms_10th": _short(1e3 * value.low),
                "batch_ms_90th": _short(1e3 * value.high),
                "spread": _short(value.spread),
            }
        elif not isinstance(value, Tensor) and field.name != "confusion":
            columns[field.name] = _short(value) if isinstance(value, float) else value
    return columns


def _short(value: float) -> str:
    return f"{value:.6g}"


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
