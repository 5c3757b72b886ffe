"""How well what a model gives for images agrees with what it gave at degree 0, by kind of output.

Each function compares the same images: `found` at some degree, `first` at degree 0. It returns its
scores by name, one value for each image, [B]. 1 means equal, except for errors, where 0 does.
"""

# Shape legend: B images, P positions, D width of features, C classes, H height, W width, K heat
# maps, Q boxes.

import torch
import torch.nn.functional as F
from torch import Tensor

_BOXES = 10
"""Boxes of an image that are compared."""
_SAME_BOX = 0.5
"""Intersection over union from which two boxes count as the same."""


def feature_agreement(
    found_BPD: Tensor, first_BPD: Tensor, real_BP: Tensor | None = None
) -> dict[str, Tensor]:
    """Mean cosine similarity of the features of each position.

    Args:
        found_BPD: Features at some degree.
        first_BPD: Features at degree 0.
        real_BP: Which positions count; the others are padding. None: all.
    """
    cosine = F.cosine_similarity(found_BPD.float(), first_BPD.float(), dim=2)
    if real_BP is None:
        return {"feature_cosine": cosine.mean(dim=1)}
    real_BP = real_BP.to(cosine.dtype)
    return {"feature_cosine": (cosine * real_BP).sum(dim=1) / real_BP.sum(dim=1)}


def class_agreement(found_BC: Tensor, first_BC: Tensor) -> dict[str, Tensor]:
    """Whether the most probable class is the same, and how far the probabilities overlap.

    The overlap of two lists of probabilities is the sum of the lesser ones: 1 if they are equal.
    """
    shared = torch.minimum(found_BC.float().softmax(dim=1), first_BC.float().softmax(dim=1))
    same = found_BC.argmax(dim=1) == first_BC.argmax(dim=1)
    return {"same_answer": same.float(), "probability_overlap": shared.sum(dim=1)}


def mask_agreement(found_BCHW: Tensor, first_BCHW: Tensor) -> dict[str, Tensor]:
    """Pixels of the same class, and the mean intersection over union (IoU) of the classes.

    The classes are those that have a pixel at either degree. One logit for each pixel (C is 1)
    stands for a binary mask: pixels with a positive logit are inside, and their IoU is compared.
    """
    found, first = _classes_of_pixels(found_BCHW), _classes_of_pixels(first_BCHW)
    binary = found_BCHW.shape[1] == 1
    count = 2 if binary else found_BCHW.shape[1]
    ious = []
    for pairs in found * count + first:
        confusion = pairs.bincount(minlength=count * count).view(count, count)
        shared = confusion.diagonal()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - shared
        if binary:
            shared, union = shared[1:], union[1:]
        present = union > 0
        each = shared[present] / union[present]
        ious.append(each.mean() if len(each) else torch.ones((), device=each.device))
    return {"same_pixels": (found == first).float().mean(dim=1), "mean_iou": torch.stack(ious)}


def _classes_of_pixels(logits_BCHW: Tensor) -> Tensor:
    """The class of each pixel, [B, pixels]."""
    if logits_BCHW.shape[1] == 1:
        return (logits_BCHW > 0).long().flatten(1)
    return logits_BCHW.argmax(dim=1).flatten(1)


def depth_agreement(found_BHW: Tensor, first_BHW: Tensor) -> dict[str, Tensor]:
    """Mean absolute difference of the depths of an image, as a fraction of their mean at degree 0.

    The error of single pixels is not divided by their depth, because models give depths of 0.
    """
    found, first = found_BHW.float().flatten(1), first_BHW.float().flatten(1)
    difference, size = (found - first).abs().mean(dim=1), first.abs().mean(dim=1)
    return {"relative_error": torch.where(difference > 0, difference / size, difference)}


def heat_map_agreement(found_BKHW: Tensor, first_BKHW: Tensor) -> dict[str, Tensor]:
    """Overlap of the heat maps of an image, and the fraction whose peak is at the same place.

    The overlap of two maps is the sum of the lesser values over the sum of the greater ones, where
    negative values count as 0. A peak is at the same place if it moves by at most one cell in each
    direction.
    """
    found, first = found_BKHW.float().clamp(min=0), first_BKHW.float().clamp(min=0)
    greater = torch.maximum(found, first).flatten(2).sum(dim=2)
    overlap = torch.minimum(found, first).flatten(2).sum(dim=2) / greater
    width = found_BKHW.shape[3]
    (row, column), (first_row, first_column) = (
        (place // width, place % width)
        for place in (maps.flatten(2).argmax(dim=2) for maps in (found_BKHW, first_BKHW))
    )
    near = ((row - first_row).abs() <= 1) & ((column - first_column).abs() <= 1)
    return {
        "overlap": torch.where(greater > 0, overlap, 1.0).mean(dim=1),
        "same_peak": near.float().mean(dim=1),
    }


def box_agreement(found_BQ: Tensor, first_BQ: Tensor) -> dict[str, Tensor]:
    """Fraction of the boxes of degree 0 that are found again.

    Compared are the 10 most confident boxes of an image at either degree. A box is found again if
    there is one of the same class whose intersection over union with it is at least 0.5. Boxes
    count by their confidence at degree 0.

    Args:
        found_BQ: Boxes [B, Q, 4 + classes]: centre and size, x before y, then the probability of
            each class.
        first_BQ: Boxes of the same images at degree 0.
    """
    shares = []
    for found, first in zip(found_BQ.float(), first_BQ.float(), strict=True):
        boxes, classes, _ = _most_confident(found)
        first_boxes, first_classes, confidence = _most_confident(first)
        same = _iou(first_boxes, boxes) >= _SAME_BOX
        same &= first_classes.unsqueeze(1) == classes.unsqueeze(0)
        shares.append((same.any(dim=1) * confidence).sum() / confidence.sum())
    return {"boxes_found_again": torch.stack(shares)}


def _most_confident(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, classes and confidences of the most confident boxes of an image."""
    confidence, classes = boxes[:, 4:].max(dim=1)
    best = confidence.topk(min(_BOXES, len(boxes)))
    return boxes[best.indices, :4], classes[best.indices], best.values


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (centre and size) with each other, [first, second]."""
    first_half, second_half = first[:, None, 2:] / 2, second[:, 2:] / 2
    high = torch.minimum(first[:, None, :2] + first_half, second[:, :2] + second_half)
    low = torch.maximum(first[:, None, :2] - first_half, second[:, :2] - second_half)
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = first[:, None, 2:].prod(dim=2) + second[:, 2:].prod(dim=1)
    return shared / (areas - shared)
