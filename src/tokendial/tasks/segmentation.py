"""Semantic segmentation: a class for every pixel."""

import torch.nn.functional as F
from torch import Tensor

from tokendial.data.readers.masks import IGNORED
from tokendial.tasks.base import Metrics
from tokendial.tasks.dense import DenseTask, resize_map


class Segmentation(DenseTask):
    """Cross-entropy over pixels, those that are ignored left out."""

    outside = IGNORED

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the pixels that count; logits [B, K, h, w], targets [B, H, W].

        0 for a batch in which none does.
        """
        logits = resize_map(logits.float(), targets.shape[-2:])
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of right pixels among those that count."""
        counts = targets != IGNORED
        right = (resize_map(logits.float(), targets.shape[-2:]).argmax(1) == targets) & counts
        return float(right.sum() / counts.sum().clamp(min=1))

    def metrics(self) -> Metrics:
        """Mean IoU, pixel accuracy, and the IoU of each class."""
        from tokendial.tasks.metrics import PixelMetrics

        return PixelMetrics(self.num_classes)
