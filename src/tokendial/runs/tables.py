"""What an evaluation found, as CSV files and per class."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.runs.evaluate import BridgedRow, DegreeRow


def write_rows(rows: Sequence[DegreeRow] | Sequence[BridgedRow], path: Path) -> None:
    """Write the table as CSV."""
    _write_csv([_columns(row) for row in rows], path)


def write_classes(rows: Sequence[DegreeRow], classes: Sequence[str], path: Path) -> None:
    """Write how well each class is recognised at each degree, as CSV.

    Args:
        rows: Of an evaluation with confusion matrices.
        classes: Their names.
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
    """How well one class is recognised at one degree."""

    name: str
    """The class."""
    images: int
    """Its images in the validation set."""
    recall: float
    """Fraction of its images that were given this class; NaN without images."""
    precision: float
    """Fraction of the images that were given this class and belong to it; NaN if none were."""
    mistaken_for: str | None
    """The other class that its images were given most often; None if that never happened."""
    times: int
    """How many of them were."""


def class_scores(row: DegreeRow, classes: Sequence[str]) -> list[ClassScores]:
    """How well each class is recognised, from the confusion matrix of a row; empty without one."""
    if row.confusion is None:
        return []
    confusion = row.confusion.cpu().double()
    right, of_class, called = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    wrong = confusion - right.diag()
    times, other = wrong.max(dim=1)
    return [
        ClassScores(
            name=name,
            images=int(of_class[number]),
            recall=float(right[number] / of_class[number]),
            precision=float(right[number] / called[number]),
            mistaken_for=classes[int(other[number])] if times[number] else None,
            times=int(times[number]),
        )
        for number, name in enumerate(classes)
    ]


def _columns(row: DegreeRow | BridgedRow) -> dict[str, Any]:
    """A row with its scores as columns, without what is no number, without digits of rounding."""
    columns: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, dict):
            columns |= {name: _short(score) for name, score in value.items()}
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
