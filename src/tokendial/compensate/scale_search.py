"""The search for the factor on a compensator's weight difference."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokendial.model.dial_vit import DialViT

SCALES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15)
"""Factors that the ToCom paper tries at inference."""


class HasScale(Protocol):
    """A compensator whose factor can be changed."""

    scale: float


@torch.no_grad()
def search_scale(
    compensator: HasScale,
    model: DialViT,
    loader: Iterable[tuple[Tensor, Tensor]],
    degree: int,
    scales: Sequence[float],
) -> dict[float, float]:
    """Set the factor with the best top-1 accuracy; see `Compensator.search_scale`."""
    if not scales:
        raise ValueError("scales must name at least one factor, got none.")
    scale_before, degree_before, training = compensator.scale, model.degree, model.training
    accuracies: dict[float, float] = {}
    try:
        model.eval()
        for scale in scales:
            # An attached compensator reads its scale when the dial turns.
            compensator.scale = scale
            model.set_degree(degree)
            accuracies[scale] = _accuracy(model, loader, scale)
        compensator.scale = max(accuracies, key=lambda scale: accuracies[scale])
        model.set_degree(degree)
    except BaseException:
        compensator.scale = scale_before
        model.set_degree(degree_before)
        model.train(training)
        raise
    return accuracies


def _accuracy(model: DialViT, loader: Iterable[tuple[Tensor, Tensor]], scale: float) -> float:
    device = next(model.parameters()).device
    correct = total = 0
    for images, targets in loader:
        predicted = model(images.to(device)).argmax(-1).cpu()
        correct += int((predicted == targets).sum())
        total += len(targets)
    if not total:
        raise ValueError(
            f"loader must give images each time it is gone through, got none at factor {scale}."
        )
    return correct / total
