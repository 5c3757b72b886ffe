"""Semantic segmentation: one of several classes for every pixel."""

import torch.nn.functional as F
from torch import Tensor

from tokendial.data.readers.mask_files import IGNORED
from tokendial.tasks.base import Metrics
from tokendial.tasks.dense_prediction import DensePrediction, resize_maps


class Segmentation(DensePrediction):
    """Dense prediction of one logit per class and pixel."""

    mask_padding = IGNORED

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over the pixels that are not ignored.

        It is 0 for a batch in which all pixels are ignored.

        Args:
            logits: Logits [B, K, h, w] at the decoder's resolution.
            targets: Masks [B, H, W] of class indices and `IGNORED`.
        """
        logits = resize_maps(logits.float(), targets.shape[-2:])
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def batch_score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the fraction of correct pixels among those that are not ignored."""
        counted = targets != IGNORED
        predicted = resize_maps(logits.float(), targets.shape[-2:]).argmax(1)
        correct = (predicted == targets) & counted
        return float(correct.sum() / counted.sum().clamp(min=1))

    def metrics(self) -> Metrics:
        """Return mean IoU, pixel accuracy, and the IoU of each class."""
        from tokendial.tasks.metrics import PixelMetrics

        return PixelMetrics(self.num_classes)
