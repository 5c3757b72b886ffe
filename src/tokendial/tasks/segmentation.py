"""Semantic segmentation: a class for every pixel."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from tokendial.data.pairs import IGNORED
from tokendial.tasks.dense import DenseTask, best_class, sized


class Segmentation(DenseTask):
    """Cross-entropy over pixels, those that are ignored left out."""

    outside = IGNORED

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the pixels that count; logits [B, K, h, w], targets [B, H, W].

        0 for a batch in which none does.
        """
        logits = sized(logits.float(), targets.shape[-2:])
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of right pixels among those that count."""
        counts = targets != IGNORED
        right = (sized(logits.float(), targets.shape[-2:]).argmax(1) == targets) & counts
        return float(right.sum() / counts.sum().clamp(min=1))

    def metrics(self) -> "PixelMetrics":
        """Mean IoU, pixel accuracy, and the IoU of each class."""
        return PixelMetrics(self.num_classes)


class PixelMetrics(MulticlassConfusionMatrix):
    """Mean IoU over the classes that occur or are found, pixel accuracy, and each class's IoU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORED, validate_args=False)

    def update(self, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Take in logits [B, K, h, w] and masks [H, W] of any sizes."""
        for own, mask in zip(logits, targets, strict=True):
            found = best_class(own.float(), mask.shape)
            super().update(found.flatten().long(), mask.flatten().to(found.device))

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # by name, as other tasks
        """Each metric by its name; what runs are judged by comes first."""
        confusion = super().compute().double()
        right, total = confusion.diagonal(), confusion.sum()
        iou = right / (confusion.sum(0) + confusion.sum(1) - right)
        per_class = {f"iou_{number}": value for number, value in enumerate(iou)}
        return {"mean_iou": iou.nanmean(), "pixel_accuracy": right.sum() / total} | per_class
