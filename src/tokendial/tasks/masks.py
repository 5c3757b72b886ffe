"""Binary masks: saliency, camouflage, defocus blur, polyps, skin lesions.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: losses and their weights. Metrics are those of
pysodmetrics, which published leaderboards use.
"""

# Shape legend: B batch, H and W pixels.

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.data.readers.masks import IGNORED
from tokendial.data.transforms.dense import DenseAugment
from tokendial.tasks.base import Metrics
from tokendial.tasks.dense import DenseTask, resize_map

BCE_WEIGHT, DICE_WEIGHT = 1.0, 0.5
_DICE_EPS = 1e-3


class BinaryMasks(DenseTask):
    """One logit for every pixel: is it inside?"""

    outside = 0

    def __init__(self, augment: DenseAugment) -> None:
        """Set up the task.

        Raises:
            ValueError: If pysodmetrics is not installed.
        """
        super().__init__(1, augment)
        if find_spec("py_sod_metrics") is None:
            raise ValueError(
                "binary masks are evaluated by pysodmetrics, which is not installed: "
                "pip install 'tokendial[masks]'."
            )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy and half the Dice loss; logits [B, 1, h, w], targets [B, H, W].

        Over the pixels that count; 0 for a batch in which none does.
        """
        logits = resize_map(logits.float(), targets.shape[-2:]).squeeze(1)
        inside, counts = (targets == 1).float(), (targets != IGNORED).float()
        total = F.binary_cross_entropy_with_logits(logits, inside, counts, reduction="sum")
        cross_entropy = total / counts.sum().clamp(min=1)
        return BCE_WEIGHT * cross_entropy + DICE_WEIGHT * dice_loss(logits, inside, counts)

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of pixels on the right side, among those that count."""
        found = resize_map(logits.float(), targets.shape[-2:]).squeeze(1) > 0
        counts = targets != IGNORED
        right = (found == (targets == 1)) & counts
        return float(right.sum() / counts.sum().clamp(min=1))

    def metrics(self) -> Metrics:
        """S-measure, F-measures, E-measures and mean absolute error."""
        from tokendial.tasks.metrics import MaskMetrics

        return MaskMetrics()


def dice_loss(logits_BHW: Tensor, inside_BHW: Tensor, counts_BHW: Tensor | None = None) -> Tensor:
    """1 - twice the intersection over the sum of both areas, mean over images.

    Args:
        logits_BHW: Of being inside.
        inside_BHW: 1 inside, 0 elsewhere.
        counts_BHW: 0 where nothing is asked, 1 elsewhere; None: 1 everywhere.

    Source:
        DAR's code: probabilities in the first power, a constant of 1e-3 above and below.
    """
    probable = logits_BHW.sigmoid()
    if counts_BHW is not None:
        probable = probable * counts_BHW
    both = (probable * inside_BHW).sum((1, 2))
    areas = probable.sum((1, 2)) + inside_BHW.sum((1, 2))
    return torch.mean(1 - (2 * both + _DICE_EPS) / (areas + _DICE_EPS))


class FeatureDistillation(nn.Module):
    """DAR*: patch features stay near those of the frozen pre-trained model, seen through two heads.

    Both heads train and go away afterwards.
    """

    def __init__(self, embed_dim: int, dim: int | None = None, *, detach: bool = False) -> None:
        """Make the heads.

        Args:
            embed_dim: Width of the features.
            dim: Width that they are compared at; None: the same.
            detach: Keep gradients out of the teacher's head. In the authors' code both heads learn,
                which a constant would satisfy as well.
        """
        super().__init__()
        dim = dim or embed_dim
        self.student, self.teacher = (
            nn.Sequential(nn.Linear(embed_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            for _ in range(2)
        )
        self.detach = detach

    def forward(self, student_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
        """Mean of 1 - cosine over images and patches; feature maps after the final norm."""
        student = self.student(student_BDHW.flatten(2).transpose(1, 2))
        teacher = self.teacher(teacher_BDHW.flatten(2).transpose(1, 2))
        if self.detach:
            teacher = teacher.detach()
        return torch.mean(1 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6))
