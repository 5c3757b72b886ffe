"""Binary masks: saliency, camouflage, defocus blur, polyps, skin lesions.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: losses and their weights. Metrics are those of
pysodmetrics, which published leaderboards use.
"""

# Shape legend: B batch, H and W pixels.

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from tokendial.data.dense import DenseAugment
from tokendial.tasks.dense import DenseTask, sized

BCE_WEIGHT, DICE_WEIGHT = 1.0, 0.5
_DICE_EPS = 1e-3
_THRESHOLDS = 256


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
        """Cross-entropy and half the Dice loss; logits [B, 1, h, w], targets [B, H, W]."""
        logits = sized(logits.float(), targets.shape[-2:]).squeeze(1)
        inside = targets.float()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, inside)
        return BCE_WEIGHT * cross_entropy + DICE_WEIGHT * dice_loss(logits, inside)

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of pixels on the right side."""
        found = sized(logits.float(), targets.shape[-2:]).squeeze(1) > 0
        return float((found == (targets > 0)).float().mean())

    def metrics(self) -> "MaskMetrics":
        """S-measure, F-measures, E-measures and mean absolute error."""
        return MaskMetrics()


def dice_loss(logits_BHW: Tensor, inside_BHW: Tensor) -> Tensor:
    """1 - twice the intersection over the sum of both areas, mean over images.

    Source:
        DAR's code: probabilities in the first power, a constant of 1e-3 above and below.
    """
    probable = logits_BHW.sigmoid()
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


class MaskMetrics(Metric):
    """pysodmetrics' measures at the size of each mask, image by image.

    S-measure; weighted F-measure (beta^2 = 1); adaptive, mean and largest F-measure (beta^2 = 0.3)
    and E-measure; mean absolute error. The largest ones are those of the mean curve. An image on
    which a measure is not defined (the S-measure of a mask one pixel high) does not count for it,
    and one of a single pixel not at all.
    """

    full_state_update = False
    scalars: Tensor
    defined: Tensor
    curves: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # S, weighted F, adaptive F, adaptive E, absolute error; the curves of F and E.
        self.add_state("scalars", torch.zeros(5), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(5), dist_reduce_fx="sum")
        self.add_state("curves", torch.zeros(2, _THRESHOLDS), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Take in logits [B, 1, h, w] and masks [H, W] of 0 and 1, of any sizes."""
        for own, mask in zip(logits, targets, strict=True):
            if mask.numel() == 1:
                continue
            probable = sized(own.unsqueeze(0).float().sigmoid(), mask.shape)[0, 0]
            grey = (probable * 255).round().byte().cpu().numpy()
            scalars, curves = _measures(grey, mask.cpu().numpy().astype(np.uint8) * 255)
            found = torch.from_numpy(scalars).to(self.scalars)
            self.scalars += found.nan_to_num()
            self.defined += found.isfinite()
            self.curves += torch.from_numpy(curves).to(self.curves)
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Each measure by its name; what runs are judged by comes first."""
        structure, weighted_f, adaptive_f, adaptive_e, error = self.scalars / self.defined
        f_curve, e_curve = self.curves / self.count
        return {
            "s_measure": structure,
            "weighted_f": weighted_f,
            "max_f": f_curve.max(),
            "mean_f": f_curve.mean(),
            "adaptive_f": adaptive_f,
            "max_e": e_curve.max(),
            "mean_e": e_curve.mean(),
            "adaptive_e": adaptive_e,
            "mae": error,
        }


def _measures(grey: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scalars [5], NaN where not defined, and curves [2, 256] of one image.

    Args:
        grey: uint8 [H, W].
        mask: uint8 [H, W], 0 or 255.
    """
    import py_sod_metrics as sod

    with warnings.catch_warnings():
        # Fmeasure says that it will be removed; what replaces it is not in all releases.
        warnings.simplefilter("ignore")
        measures: list[Any] = [
            sod.Smeasure(),
            sod.WeightedFmeasure(),
            sod.Fmeasure(),
            sod.Emeasure(),
            sod.MAE(),
        ]
        for measure in measures:
            measure.step(pred=grey, gt=mask)
    s, weighted, f, e, mae = (measure.get_results() for measure in measures)
    scalars = [s["sm"], weighted["wfm"], f["fm"]["adp"], e["em"]["adp"], mae["mae"]]
    return np.array(scalars, np.float64), np.stack([f["fm"]["curve"], e["em"]["curve"]])
