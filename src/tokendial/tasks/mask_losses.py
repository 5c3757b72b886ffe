"""Losses on binary masks, which a recipe can combine.

Source: the code of DAR ("Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for
Pixel-Level Tasks", CVPR 2025), whose values all of them have. The weighting of pixels near an edge
is that of F3Net (Wei et al., AAAI 2020, https://arxiv.org/abs/1911.11445), the uncertainty that of
ZoomNet (Pang et al., CVPR 2022, https://arxiv.org/abs/2203.02688).
"""

# Shape legend: B batch, H and W pixels.

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MaskLoss = Literal["bce", "weighted_bce", "dice", "iou", "ual"]
"""Name of a loss on binary masks, see `MASK_LOSSES`."""
PUBLISHED: dict[MaskLoss, float] = {"bce": 1.0, "dice": 0.5}
"""The losses of DAR, with their weights."""
_DICE_EPS = 1e-3
_IOU_EPS = 1e-6
_EDGE_WINDOW, _EDGE_WEIGHT = 31, 5.0


def bce_loss(logits_BHW: Tensor, inside_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the pixels that count.

    Args:
        logits_BHW: Logits of being inside.
        inside_BHW: Target: 1 inside, 0 elsewhere.
        counted_BHW: 0 at ignored pixels, 1 elsewhere.
    """
    total = F.binary_cross_entropy_with_logits(logits_BHW, inside_BHW, counted_BHW, reduction="sum")
    return total / counted_BHW.sum().clamp(min=1)


def weighted_bce_loss(logits_BHW: Tensor, inside_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Binary cross-entropy in which pixels near an edge weigh up to six times as much.

    The weight is 1 + 5 * |mean of the target in a window of 31 pixels - target|; the mean is taken
    in each image, then over images. See `bce_loss` for the arguments.
    """
    half = _EDGE_WINDOW // 2
    around = F.avg_pool2d(inside_BHW.unsqueeze(1), _EDGE_WINDOW, stride=1, padding=half).squeeze(1)
    weight = (1 + _EDGE_WEIGHT * (around - inside_BHW).abs()) * counted_BHW
    each = F.binary_cross_entropy_with_logits(logits_BHW, inside_BHW, weight, reduction="none")
    return (each.sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)).mean()


def dice_loss(logits_BHW: Tensor, inside_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """1 minus twice the intersection over the sum of both areas, averaged over images.

    Probabilities are not squared, and 1e-3 is added to numerator and denominator. See `bce_loss`
    for the arguments.
    """
    probability = logits_BHW.sigmoid() * counted_BHW
    intersection = (probability * inside_BHW).sum((1, 2))
    areas = probability.sum((1, 2)) + inside_BHW.sum((1, 2))
    return torch.mean(1 - (2 * intersection + _DICE_EPS) / (areas + _DICE_EPS))


def iou_loss(logits_BHW: Tensor, inside_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """1 minus the intersection over the union, averaged over images; see `bce_loss`."""
    probability = logits_BHW.sigmoid() * counted_BHW
    intersection = (probability * inside_BHW).sum((1, 2))
    union = probability.sum((1, 2)) + inside_BHW.sum((1, 2)) - intersection
    return torch.mean(1 - intersection / union.clamp(min=_IOU_EPS))


def uncertainty_loss(logits_BHW: Tensor, inside_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Mean of 1 - (2p - 1)**2: 1 for an undecided pixel, 0 for a decided one, right or wrong.

    It needs another loss beside it. See `bce_loss` for the arguments.
    """
    undecided = 1 - (2 * logits_BHW.sigmoid() - 1).square()
    return (undecided * counted_BHW).sum() / counted_BHW.sum().clamp(min=1)


MASK_LOSSES: dict[MaskLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce_loss,
    "weighted_bce": weighted_bce_loss,
    "dice": dice_loss,
    "iou": iou_loss,
    "ual": uncertainty_loss,
}


def mask_loss(
    logits_BHW: Tensor,
    inside_BHW: Tensor,
    counted_BHW: Tensor,
    weights: Mapping[MaskLoss, float],
) -> Tensor:
    """The weighted sum of losses.

    Args:
        logits_BHW: Logits of being inside.
        inside_BHW: Target: 1 inside, 0 elsewhere.
        counted_BHW: 0 at ignored pixels, 1 elsewhere.
        weights: Weight of each loss by its name.
    """
    losses = [
        weight * MASK_LOSSES[name](logits_BHW, inside_BHW, counted_BHW)
        for name, weight in weights.items()
    ]
    return torch.stack(losses).sum()
