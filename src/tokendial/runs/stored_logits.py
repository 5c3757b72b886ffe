"""Logits of a classification that are kept, so that several things can be computed from them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.model.dial import InferenceModel
from tokendial.tasks import Classification


@torch.no_grad()
def collect_logits(
    model: InferenceModel,
    degrees: Sequence[int],
    loader: DataLoader[Any],
    task: Classification,
    *,
    before_batch: Callable[[int], object] = lambda degree: None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Logits [N, K] of all images at each degree, in float32, and the labels; on the CPU.

    Args:
        model: The model. It is left in evaluation mode, at one of the degrees.
        degrees: Degrees that it offers.
        loader: Gives batches of images and labels.
        task: What the model was trained for.
        before_batch: Called with the degree before each forward pass.
    """
    model.eval()
    found: dict[int, list[Tensor]] = {degree: [] for degree in degrees}
    labels = []
    for images, targets in loader:
        for degree, logits in found.items():
            before_batch(degree)
            model.set_degree(degree)
            logits.append(task.predict(model, images.to(model.device)).float().cpu())
        labels.append(targets)
    return {degree: torch.cat(logits) for degree, logits in found.items()}, torch.cat(labels)


def scores_of(task: Classification, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of the task by name, the main one first, from all logits [N, K] and labels."""
    metrics = task.metrics()
    metrics.update(logits, labels.long())
    return {name: float(value) for name, value in metrics.compute().items()}
