"""Measures of binary masks as the code of DAR computes them, for its published numbers.

Source: the authors' code of "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT
for Pixel-Level Tasks" (DAR), CVPR 2025. It differs from pysodmetrics (`MaskMetrics`):

- Probabilities are neither rounded to grey levels nor stretched to the range from 0 to 1.
- Curves have the thresholds 0 to 254, and a pixel is inside above a threshold, not at it.
- The largest value of a curve is taken in each image, then averaged.
- The weighted F-measure has beta^2 = 0.3 (usually 1).
- The E-measure has no special case for an empty or a full mask.

Departure: in the authors' code, curves of a batch run on from one image to the next. Here each
image counts alone, as in theirs with one image in a batch.
"""

# Shape legend: H and W pixels, N pixels that count, T thresholds.

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from tokendial.data.readers.mask_files import IGNORED
from tokendial.tasks.dense_prediction import resize_maps

_EPS = 1e-9
_BETA_SQUARED = 0.3
_OBJECT_SHARE = 0.5
_THRESHOLDS = 255
_NAMES = (
    *("s_measure", "weighted_f", "max_f", "mean_f", "adaptive_f"),
    *("max_e", "mean_e", "adaptive_e", "mae"),
)


class DARMaskMetrics(Metric):
    """The measures that DAR's paper reports, with the names of `MaskMetrics`.

    An image on which a measure is not defined (such as the S-measure of a mask of one pixel) is
    left out of that measure. Ignored pixels are treated as in `MaskMetrics`.
    """

    full_state_update = False
    sums: Tensor
    defined: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(_NAMES)), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(len(_NAMES)), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Add logits [B, 1, h, w] and their masks [H, W] of 0, 1 and `IGNORED`, of any sizes."""
        for image_logits, mask in zip(logits, targets, strict=True):
            if (mask != IGNORED).sum() <= 1:
                continue
            # Levels are cut off, not rounded, so a probability must not lose its last bits.
            probability = image_logits.cpu().double().sigmoid().float()
            resized = resize_maps(probability[None], mask.shape)[0, 0].double()
            found = torch.stack(_measures(resized, mask.cpu())).to(self.sums)
            self.sums += found.nan_to_num()
            self.defined += found.isfinite()

    def compute(self) -> dict[str, Tensor]:
        """Return each measure by its name; the first one, the S-measure, selects the best epoch."""
        return dict(zip(_NAMES, self.sums / self.defined, strict=True))


def _measures(probability_HW: Tensor, mask_HW: Tensor) -> list[Tensor]:
    """Return the measures of one image in the order of `_NAMES`, NaN where not defined."""
    counted, inside = mask_HW != IGNORED, (mask_HW == 1).double()
    # For measures that depend on positions: ignored pixels are outside in prediction and target.
    whole = torch.where(counted, probability_HW, 0.0)
    # For the other measures: the pixels that are not ignored, whatever their places.
    p_N, t_N = probability_HW[counted], inside[counted]
    true_T, false_T = _pixels_above(p_N, t_N)
    adaptive = p_N > (2 * p_N.mean()).clamp(max=1)
    adaptive_true = (adaptive * t_N).sum()
    at_adaptive = adaptive_true, adaptive.sum() - adaptive_true
    f_T, e_T = (measure(true_T, false_T, t_N) for measure in (_f_measure, _e_measure))
    return [
        _s_measure(whole, inside),
        _weighted_f(whole, inside),
        f_T.max(),
        f_T.mean(),
        _f_measure(*at_adaptive, t_N),
        e_T.max(),
        e_T.mean(),
        _e_measure(*at_adaptive, t_N),
        (p_N - t_N).abs().mean(),
    ]


def _pixels_above(p_N: Tensor, t_N: Tensor) -> tuple[Tensor, Tensor]:
    """Number of pixels above each threshold: inside the target [T], and outside of it [T]."""
    level_N = (p_N.float() * 255).int()
    at_level = [
        torch.bincount(level_N[which], minlength=_THRESHOLDS + 1) for which in (t_N == 1, t_N == 0)
    ]
    inside, outside = (each.flip(0).cumsum(0).flip(0)[1:].double() for each in at_level)
    return inside, outside


def _f_measure(true: Tensor, false: Tensor, t_N: Tensor) -> Tensor:
    """F-measure of `true` right and `false` wrong pixels inside of the prediction."""
    precision = true / (true + false + _EPS)
    recall = true / (t_N.sum() + _EPS)
    weighted = _BETA_SQUARED * precision + recall + _EPS
    return (1 + _BETA_SQUARED) * precision * recall / weighted


def _e_measure(true: Tensor, false: Tensor, t_N: Tensor) -> Tensor:
    """E-measure of `true` right and `false` wrong pixels inside of the prediction.

    A pixel's part depends on only two things: whether it is inside of the target, and inside of the
    prediction.
    """
    count, num_inside = len(t_N), t_N.sum()
    mean_target, mean_predicted = num_inside / count, (true + false) / count
    total = torch.zeros_like(true)
    for in_target, in_predicted, pixels in (
        (1, 1, true),
        (1, 0, num_inside - true),
        (0, 1, false),
        (0, 0, count - num_inside - false),
    ):
        a, b = in_target - mean_target, in_predicted - mean_predicted
        alignment = (2 * a * b + _EPS) / (a.square() + b.square() + _EPS)
        total = total + pixels * (1 + alignment).square() / 4
    return total / count


def _s_measure(p_HW: Tensor, t_HW: Tensor) -> Tensor:
    share = t_HW.mean()
    if share == 0:
        return 1 - p_HW.mean()
    if share == 1:
        return p_HW.mean()
    objects = share * _likeness(p_HW[t_HW == 1])
    objects = objects + (1 - share) * _likeness(1 - p_HW[t_HW == 0])
    score = _OBJECT_SHARE * objects + (1 - _OBJECT_SHARE) * _regions(p_HW, t_HW)
    return score.clamp(min=0)


def _likeness(p_N: Tensor) -> Tensor:
    """How like 1 the probabilities are, and each other; NaN for a single pixel."""
    mean = p_N.mean()
    deviation = p_N.std() if len(p_N) > 1 else torch.tensor(torch.nan)
    return 2 * mean / (mean.square() + 1 + deviation + _EPS)


def _regions(p_HW: Tensor, t_HW: Tensor) -> Tensor:
    """Structural similarity in the four parts around the target's centre, weighted by area."""
    (height, width), area = t_HW.shape, t_HW.numel()
    row, column = (int(n) + 1 for n in t_HW.nonzero().float().mean(dim=0).round())
    score = torch.zeros((), dtype=p_HW.dtype)
    for rows in (slice(0, row), slice(row, height)):
        for columns in (slice(0, column), slice(column, width)):
            part = t_HW[rows, columns]
            score = score + part.numel() / area * _similarity(p_HW[rows, columns], part)
    return score


def _similarity(p_HW: Tensor, t_HW: Tensor) -> Tensor:
    """Structural similarity of a part; 0 if it is empty, NaN for a single pixel."""
    if t_HW.numel() <= 1:
        return torch.tensor(0.0 if t_HW.numel() == 0 else torch.nan)
    p, t = p_HW.mean(), t_HW.mean()
    variances = p_HW.var() + t_HW.var()
    covariance = ((p_HW - p) * (t_HW - t)).sum() / (t_HW.numel() - 1)
    alpha, beta = 4 * p * t * covariance, (p.square() + t.square()) * variances
    if alpha.abs() >= _EPS:
        return (alpha + _EPS) / (beta + _EPS)
    return torch.tensor(float(beta.abs() < _EPS))


def _weighted_f(p_HW: Tensor, t_HW: Tensor) -> Tensor:
    """Weighted F-measure (Margolin et al., "How to Evaluate Foreground Maps?", CVPR 2014)."""
    from scipy.ndimage import distance_transform_edt

    found: Any = distance_transform_edt(1 - t_HW.numpy(), return_indices=True)
    distance, (rows, columns) = torch.from_numpy(found[0]), torch.from_numpy(found[1]).long()
    inside, outside = t_HW == 1, t_HW == 0
    error = (p_HW - t_HW).abs()
    # Outside, an error counts like that of the nearest pixel inside.
    spread = torch.where(outside, error[rows, columns], error)
    smoothed = F.conv2d(spread[None, None], _gaussian()[None, None], padding="same")[0, 0]
    error = torch.where(inside & (smoothed < error), smoothed, error)
    weight = torch.where(outside, 2 - torch.exp(np.log(0.5) / 5 * distance), 1.0)
    weighted = error * weight
    right, wrong = t_HW.sum() - weighted[inside].sum(), weighted[outside].sum()
    recall = 1 - weighted[inside].mean() if inside.any() else torch.tensor(1.0)
    precision = (right + _EPS) / (right + wrong + _EPS)
    above = (1 + _BETA_SQUARED) * recall * precision + _EPS
    return above / (recall + _BETA_SQUARED * precision + _EPS)


def _gaussian() -> Tensor:
    """Weights [7, 7] of a Gaussian with a deviation of 5 pixels; their sum is 1."""
    offsets = torch.arange(-3, 4, dtype=torch.double)
    line = torch.exp(-offsets.square() / 50)
    square = line[:, None] * line
    return square / square.sum()
