"""The metrics of every task.

Imported where metrics are made: torchmetrics takes longer to import than torch does.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
)
from torchmetrics.utilities import dim_zero_cat

from tokendial.data.readers.masks import IGNORED
from tokendial.tasks.dense import best_class, resize_map

_THRESHOLDS = 256
_LOG = logging.getLogger(__name__)


def class_metrics(num_classes: int, *, multi_label: bool) -> MetricCollection:
    """Accuracy, and mean average precision or top-5 accuracy, of logits [B, num_classes]."""
    metrics: dict[str, Metric | MetricCollection]
    if multi_label:
        metrics = {
            "accuracy": MultilabelAccuracy(num_classes, average="micro"),
            "mean_average_precision": MeanAveragePrecision(num_classes),
        }
    else:
        metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics)


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean of the average precision of the classes that at least one image has.

    torchmetrics counts the others as 0, though nothing could have been found of them.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]  # a number, not curves
        """Mean in [0, 1]; NaN if no image has any class."""
        with warnings.catch_warnings():
            # torchmetrics warns of classes that no image has; they are left out below.
            warnings.filterwarnings("ignore", message="No positive samples")
            per_class = torch.as_tensor(super().compute())
        present = dim_zero_cat(self.target).gt(0).any(dim=0)
        _tell_share("mean_average_precision", present, "no image has the others")
        return per_class[present].mean()


def _tell_share(metric: str, counted: Tensor, why: str) -> None:
    """Log how many classes a mean is over, if not over all.

    Args:
        metric: Its name.
        counted: [classes] bool.
        why: The others do not count.
    """
    if not counted.all():
        _tell(f"{metric} is the mean over {int(counted.sum())} of {len(counted)} classes: {why}")


@cache
def _tell(line: str) -> None:
    """Log a line once, however many epochs and degrees have it."""
    _LOG.warning(line)


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
        why = "the others are neither in the masks nor found"
        _tell_share("mean_iou", ~iou.isnan(), why)
        per_class = {f"iou_{number}": value for number, value in enumerate(iou)}
        return {"mean_iou": iou.nanmean(), "pixel_accuracy": right.sum() / total} | per_class


class MaskMetrics(Metric):
    """pysodmetrics' measures at the size of each mask, image by image.

    S-measure; weighted F-measure (beta^2 = 1); adaptive, mean and largest F-measure (beta^2 = 0.3)
    and E-measure; mean absolute error. The largest ones are those of the mean curve. An image on
    which a measure is not defined (the S-measure of a mask one pixel high) does not count for it,
    and one with at most one pixel that counts not at all. Pixels where nothing is asked are left
    out; the S-measure and the weighted F-measure, which see where pixels lie, take them for outside
    and rightly found to be so.
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
        """Take in logits [B, 1, h, w] and masks [H, W] of 0, 1 and `IGNORED`, of any sizes."""
        for own, mask in zip(logits, targets, strict=True):
            if (mask != IGNORED).sum() <= 1:
                continue
            probable = resize_map(own.unsqueeze(0).float().sigmoid(), mask.shape)[0, 0]
            grey = (probable * 255).round().byte().cpu().numpy()
            scalars, curves = _measures(grey, mask.cpu().numpy())
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
        mask: [H, W], 1 inside, 0 outside, `IGNORED` where nothing is asked.
    """
    import py_sod_metrics as sod

    counts, inside = mask != IGNORED, (mask == 1).astype(np.uint8) * 255
    whole = np.where(counts, grey, grey[counts].min()), inside
    # In a row, for measures that do not look at where pixels lie.
    row = (grey, inside) if counts.all() else (grey[counts][None], inside[counts][None])
    with warnings.catch_warnings():
        # Fmeasure says that it will be removed; what replaces it is not in all releases.
        warnings.simplefilter("ignore")
        measures: list[tuple[Any, tuple[np.ndarray, np.ndarray]]] = [
            (sod.Smeasure(), whole),
            (sod.WeightedFmeasure(), whole),
            (sod.Fmeasure(), row),
            (sod.Emeasure(), row),
            (sod.MAE(), row),
        ]
        for measure, (pred, gt) in measures:
            measure.step(pred=pred, gt=gt)
    s, weighted, f, e, mae = (measure.get_results() for measure, _ in measures)
    scalars = [s["sm"], weighted["wfm"], f["fm"]["adp"], e["em"]["adp"], mae["mae"]]
    return np.array(scalars, np.float64), np.stack([f["fm"]["curve"], e["em"]["curve"]])
