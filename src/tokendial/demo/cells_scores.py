"""Scores of the solar-cell demo: what the model says of each test cell, and how sure that is."""

# Shape legend: N test cells.

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.measure import Interval, Timing, bootstrap_interval
from tokendial.model.dial_vit import DialViT
from tokendial.runs.evaluate import time_degrees, validation_set
from tokendial.runs.run import Run

BATCH_SIZE = 32
"""Cells per forward pass, for predictions and for measured speeds."""
_DEFECTIVE = "defective"
"""Name of the class whose probability is reported."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells that scores are computed on, prepared for the model, and what experts said."""

    pictures: Any
    """The data set: pairs of a picture and its class."""
    batches: list[Tensor]
    """The pictures as the model takes them, in batches [B, 3, H, W]."""
    defective: Tensor
    """[N] bool: whether the cell is defective, that is, its grade is 2 or 3."""
    grades: Tensor
    """[N]: what the experts said, from 0 (sound) and 1 (probably sound) to 3 (defective)."""
    poly: Tensor
    """[N] bool: whether the cell is of polycrystalline silicon, else monocrystalline."""
    column: int
    """Index of the class "defective" in the model's output."""

    def __len__(self) -> int:
        return len(self.defective)


def read_cells(run: Run, model: DialViT) -> Cells:
    """Read the test cells of a run on ELPV."""
    _, loader = validation_set(run, model, BATCH_SIZE)
    batches, labels = zip(*loader, strict=True)
    data, column = run.recipe().data, run.classes().index(_DEFECTIVE)

    def labels_of(task: str) -> Tensor:
        # Each task has the same test cells in the same order.
        val: Any = replace(data, task=task).build(run.recipe().seed).val
        return torch.tensor(val.labels)

    return Cells(
        pictures=run.data().val,
        batches=list(batches),
        defective=torch.cat(labels) == column,
        grades=labels_of("grade"),
        poly=labels_of("type") == 1,
        column=column,
    )


@dataclass(frozen=True, slots=True)
class CellRow:
    """What a model says of the test cells at one degree, and what that costs."""

    degree: int
    """Degree of the dial."""
    gmacs: float
    """Multiply-accumulates for one picture, in 1e9."""
    tokens: int
    """Areas of a picture that the last layer still tells apart."""
    timing: Timing
    """Measured time of a forward pass of `BATCH_SIZE` pictures. All degrees took turns."""
    images_per_s: float
    """Pictures per second of the forward pass."""
    probability: Tensor
    """[N]: the model's probability that the cell is defective."""
    right: Tensor
    """[N] float, 0 or 1: whether the model is right, which calls a cell defective above 1/2."""
    accuracy: Interval
    """Fraction of right answers."""
    balanced_accuracy: Interval
    """Mean of the fractions of right answers on defective and on sound cells."""

    @property
    def called_defective(self) -> Tensor:
        """[N] bool: whether the model calls the cell defective."""
        return self.probability > 0.5


def rows_of_dial(model: DialViT, cells: Cells, degrees: Sequence[int]) -> list[CellRow]:
    """Run a model on the test cells at each degree, and measure its speed there."""
    probabilities = [defect_probability(model, cells, degree) for degree in degrees]
    timings = time_degrees(model, cells.batches[0], degrees)
    return [
        _row(model, cells, degree, timing, probability)
        for degree, timing, probability in zip(degrees, timings, probabilities, strict=True)
    ]


def _row(model: DialViT, cells: Cells, degree: int, timing: Timing, probability: Tensor) -> CellRow:
    right, cost = answers(probability, cells), model.cost(degree)
    return CellRow(
        degree=degree,
        gmacs=cost.gmacs,
        tokens=cost.tokens_per_layer[-1] - model.anatomy.shape.num_prefix_tokens,
        timing=timing,
        images_per_s=len(cells.batches[0]) / timing.seconds,
        probability=probability,
        right=right,
        accuracy=bootstrap_interval(torch.mean, right),
        balanced_accuracy=bootstrap_interval(balanced_accuracy, right, cells.defective),
    )


@torch.no_grad()
def defect_probability(model: DialViT, cells: Cells, degree: int) -> Tensor:
    """[N]: the probability that each cell is defective, at a degree."""
    model.set_degree(degree)
    model.eval()
    device = next(model.parameters()).device
    logits = torch.cat([model(batch.to(device)).float().cpu() for batch in cells.batches])
    return logits.softmax(dim=-1)[:, cells.column]


def answers(probability: Tensor, cells: Cells) -> Tensor:
    """[N] float, 0 or 1: whether a model with these probabilities is right."""
    return ((probability > 0.5) == cells.defective).float()


def balanced_accuracy(right: Tensor, defective: Tensor) -> Tensor:
    """Mean of the fractions of right answers on defective and on sound cells.

    Args:
        right: [N] float, 0 or 1: whether the answer is right.
        defective: [N] bool: which cells are defective.
    """
    kinds = [right[kind] for kind in (defective, ~defective) if kind.any()]
    return torch.stack([kind.mean() for kind in kinds]).mean()


def gain(before: Tensor, after: Tensor) -> Interval:
    """Difference in accuracy on the same cells, from `before` to `after`.

    Args:
        before: [N] float, 0 or 1: whether the answer was right before.
        after: [N] float, 0 or 1: the same afterwards.
    """
    return bootstrap_interval(lambda first, second: (second - first).mean(), before, after)


def write_cells_csv(rows: Sequence[CellRow], path: Path) -> None:
    """Write the rows of the dial as CSV, one line per degree."""
    table = [
        {
            "degree": row.degree,
            "accuracy": row.accuracy.value,
            "accuracy_low": row.accuracy.low,
            "accuracy_high": row.accuracy.high,
            "balanced_accuracy": row.balanced_accuracy.value,
            "balanced_accuracy_low": row.balanced_accuracy.low,
            "balanced_accuracy_high": row.balanced_accuracy.high,
            "gmacs": row.gmacs,
            "images_per_s": row.images_per_s,
            "spread": row.timing.spread,
            "areas": row.tokens,
        }
        for row in rows
    ]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        for line in table:
            writer.writerow({name: f"{value:.6g}" for name, value in line.items()})
