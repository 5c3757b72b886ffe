"""Binary masks: saliency, camouflage, defocus blur, polyps, skin lesions.

Source of the losses and their weights: "Rethinking Token Reduction with Parameter-Efficient
Fine-Tuning in ViT for Pixel-Level Tasks" (DAR), CVPR 2025, and the authors' code. The metrics are
those of pysodmetrics, which published leaderboards use, or those of DAR's code.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.data.readers.mask_files import IGNORED
from tokendial.data.transforms.masks import MaskAugment
from tokendial.tasks.base import Metrics
from tokendial.tasks.dense_prediction import DensePrediction, resize_maps
from tokendial.tasks.mask_losses import PUBLISHED, MaskLoss, mask_loss

MaskMeasures = Literal["pysodmetrics", "dar"]
"""Which code's measures of binary masks."""


class BinaryMasks(DensePrediction):
    """Dense prediction of one logit per pixel: whether the pixel is inside."""

    mask_padding = 0

    def __init__(
        self,
        augment: MaskAugment,
        losses: Mapping[MaskLoss, float] = PUBLISHED,
        measures: MaskMeasures = "pysodmetrics",
    ) -> None:
        """Set up the task.

        Args:
            augment: How images and masks are augmented, and how test images are prepared.
            losses: Weight of each loss in training.
            measures: Whose measures the evaluation computes.

        Raises:
            ValueError: If pysodmetrics is not installed.
        """
        super().__init__(1, augment)
        self.losses, self.measures = losses, measures
        if find_spec("py_sod_metrics") is None:
            raise ValueError(
                "evaluating binary masks needs pysodmetrics, which is not installed: "
                "pip install 'tokendial[masks]'."
            )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum of the losses, over the pixels that are not ignored.

        With the published ones it is 0 for a batch in which all pixels are ignored.

        Args:
            logits: Logits [B, 1, h, w] at the decoder's resolution.
            targets: Masks [B, H, W] of 0, 1 and `IGNORED`.
        """
        logits = resize_maps(logits.float(), targets.shape[-2:]).squeeze(1)
        inside, counted = (targets == 1).float(), (targets != IGNORED).float()
        return mask_loss(logits, inside, counted, self.losses)

    def batch_score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the fraction of correct pixels among those that are not ignored."""
        predicted = resize_maps(logits.float(), targets.shape[-2:]).squeeze(1) > 0
        counted = targets != IGNORED
        correct = (predicted == (targets == 1)) & counted
        return float(correct.sum() / counted.sum().clamp(min=1))

    def metrics(self) -> Metrics:
        """Return S-measure, F-measures, E-measures and mean absolute error."""
        if self.measures == "dar":
            from tokendial.tasks.dar_metrics import DARMaskMetrics

            return DARMaskMetrics()
        from tokendial.tasks.metrics import MaskMetrics

        return MaskMetrics()


class FeatureDistillation(nn.Module):
    """Distillation of DAR*: keeps patch features near those of the frozen pre-trained model.

    Two small heads map the features of student and teacher before they are compared. Both heads are
    trained, and neither is part of the saved model.
    """

    def __init__(self, embed_dim: int, dim: int | None = None, *, detach: bool = False) -> None:
        """Create the heads.

        Args:
            embed_dim: Width of the features.
            dim: Width of the outputs of the heads; None means `embed_dim`.
            detach: Whether to stop gradients into the teacher's head. In the authors' code both
                heads learn, so two heads with a constant output would minimise the loss as well.
        """
        super().__init__()
        dim = dim or embed_dim
        self.student, self.teacher = (
            nn.Sequential(nn.Linear(embed_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            for _ in range(2)
        )
        self.detach = detach

    def forward(self, student_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
        """Return the mean of 1 - cosine similarity over images and patches.

        Args:
            student_BDHW: Feature map of the trained model after its final norm.
            teacher_BDHW: Feature map of the frozen model after its final norm.
        """
        student = self.student(student_BDHW.flatten(2).transpose(1, 2))
        teacher = self.teacher(teacher_BDHW.flatten(2).transpose(1, 2))
        if self.detach:
            teacher = teacher.detach()
        return torch.mean(1 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6))
