"""Metrics of the tasks, on torchmetrics and pysodmetrics.

Tasks import this module when they create metrics, because torchmetrics takes longer to import than
torch.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
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

from tokendial.data.readers.mask_files import IGNORED
from tokendial.measure.neighbours import embedding_scores
from tokendial.tasks.dense_prediction import best_class, resize_maps

_THRESHOLDS = 256
_LOG = logging.getLogger(__name__)


def class_metrics(
    num_classes: int, *, multi_label: bool, names: Sequence[str] | None = None
) -> MetricCollection:
    """Return the metrics of a classification task on logits [B, num_classes].

    Args:
        num_classes: Number of classes.
        multi_label: Whether an image can have several labels.
        names: Metrics to compute, in this order: those of `CLASS_METRICS`. None means accuracy, and
            top-5 accuracy (with more than 5 classes) or mean average precision (with several labels
            for an image).
    """
    metrics: dict[str, Metric | MetricCollection]
    if multi_label:
        metrics = {
            "accuracy": MultilabelAccuracy(num_classes, average="micro"),
            "mean_average_precision": MeanAveragePrecision(num_classes),
        }
        return MetricCollection(metrics)
    if names is None:
        names = ("accuracy", "accuracy_top5") if num_classes > 5 else ("accuracy",)
    # A mapping would be sorted by name. The first metric selects the best epoch, so order matters.
    collection = MetricCollection({})
    for name in names:
        collection.add_metrics({name: CLASS_METRICS[name](num_classes)})
    return collection


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean recall over the classes that at least one image has."""

    def compute(self) -> Tensor:
        """Return the mean in [0, 1]."""
        confusion = super().compute().double()
        recall = confusion.diagonal() / confusion.sum(dim=1)
        _log_class_share("balanced_accuracy", ~recall.isnan(), "no image has the other classes")
        return recall.nanmean()


class F1(MulticlassConfusionMatrix):
    """F1 score of the second class, if there are two classes; otherwise the mean over classes.

    Classes that no image has and that are never predicted are not part of the mean.
    """

    def compute(self) -> Tensor:
        """Return the score in [0, 1]; 0 if the second of two classes never occurs."""
        confusion = super().compute().double()
        f1 = 2 * confusion.diagonal() / (confusion.sum(dim=0) + confusion.sum(dim=1))
        if len(f1) == 2:
            return f1[1].nan_to_num()
        reason = "no image has the other classes, and none are predicted"
        _log_class_share("f1", ~f1.isnan(), reason)
        return f1.nanmean()


class AUROC(Metric):
    """Area under the ROC curve of the second class, if there are two classes.

    With more classes it is the mean over the classes, each against the rest. Classes that no image
    has are not part of the mean.
    """

    logits: list[Tensor]
    target: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits [B, K] and class indices [B]."""
        self.logits.append(logits.detach())
        self.target.append(targets)

    def compute(self) -> Tensor:
        """Return the area in [0, 1].

        Raises:
            ValueError: If all images have the same class.
        """
        # In double precision: in single precision, confident probabilities round to 1 and tie.
        # Computed on the CPU, because some accelerators lack double precision.
        probabilities = dim_zero_cat(self.logits).cpu().double().softmax(dim=1)
        target = dim_zero_cat(self.target).cpu()
        present = torch.bincount(target, minlength=self.num_classes) > 0
        if present.sum() < 2:
            raise ValueError(
                f"metrics: auroc needs images of at least two classes, but all {len(target):,} "
                f"images have class {int(target[0])}."
            )
        if self.num_classes == 2:
            return _area_under_roc(probabilities[:, 1], target == 1)
        _log_class_share("auroc", present, "no image has the other classes")
        areas = [
            _area_under_roc(probabilities[:, label], target == label)
            for label in present.nonzero().flatten().tolist()
        ]
        return torch.stack(areas).mean()


def _area_under_roc(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the probability that a positive's score [N] is above a negative's; ties count half."""
    # Equal scores share the mean of their ranks (Mann-Whitney U).
    _, group, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2)[group].double()
    num_positive = int(positive.sum())
    wins: Tensor = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return wins / (num_positive * (len(scores) - num_positive))


CLASS_METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": partial(MulticlassAccuracy, average="micro"),
    "accuracy_top5": partial(MulticlassAccuracy, average="micro", top_k=5),
    "balanced_accuracy": BalancedAccuracy,
    "f1": F1,
    "auroc": AUROC,
}
"""Makes each metric for images with one label, given the number of classes."""


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean average precision over the classes that at least one image has.

    torchmetrics counts the other classes as 0, although no image of them could have been found.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]  # a number, not curves
        """Return the mean in [0, 1]; NaN if no image has any class."""
        with warnings.catch_warnings():
            # torchmetrics warns about classes that no image has; they are left out below.
            warnings.filterwarnings("ignore", message="No positive samples")
            per_class = torch.as_tensor(super().compute())
        present = dim_zero_cat(self.target).gt(0).any(dim=0)
        _log_class_share("mean_average_precision", present, "no image has the other classes")
        return per_class[present].mean()


def _log_class_share(metric: str, counted: Tensor, reason: str) -> None:
    """Log how many classes a mean is taken over, if it is not all of them.

    Args:
        metric: Name of the metric.
        counted: Whether each class is part of the mean, bool [classes].
        reason: Why the other classes are not.
    """
    if not counted.all():
        share = f"{int(counted.sum())} of {len(counted)} classes"
        _log_once(f"{metric} is the mean over {share}: {reason}")


@cache
def _log_once(line: str) -> None:
    """Log a line once in a process; without this, each epoch and each degree would log it."""
    _LOG.warning(line)


class PixelMetrics(MulticlassConfusionMatrix):
    """Mean IoU over the classes that are in masks or predicted, pixel accuracy, IoU by class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORED, validate_args=False)

    def update(self, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Add predictions and their masks [H, W].

        Args:
            logits: Logits [B, K, h, w], whose size may differ from that of the masks; or class
                indices [B, H, W].
            targets: Masks of class indices and `IGNORED`.
        """
        for prediction, mask in zip(logits, targets, strict=True):
            predicted = prediction
            if prediction.is_floating_point():
                predicted = best_class(prediction.float(), mask.shape)
            super().update(predicted.flatten().long(), mask.flatten().to(predicted.device))

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # by name, as other tasks
        """Return each metric by its name; the first one, mean IoU, selects the best epoch."""
        confusion = super().compute().double()
        correct, total = confusion.diagonal(), confusion.sum()
        iou = correct / (confusion.sum(0) + confusion.sum(1) - correct)
        reason = "the other classes are neither in the masks nor predicted"
        _log_class_share("mean_iou", ~iou.isnan(), reason)
        per_class = {f"iou_{number}": value for number, value in enumerate(iou)}
        return {"mean_iou": iou.nanmean(), "pixel_accuracy": correct.sum() / total} | per_class


class EmbeddingMetrics(Metric):
    """Agreement of embeddings with targets of the same images: cosine and nearest neighbours."""

    embeddings: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        """Add embeddings and targets, both [B, D]."""
        self.embeddings.append(embeddings.detach())
        self.targets.append(targets)

    def compute(self) -> dict[str, float]:
        """Return what `embedding_scores` names cosine, which selects the best epoch, and
        same_neighbours. The names here tell what is compared with: the frozen backbone.

        Raises:
            ValueError: If there are fewer than three images.
        """
        scores = embedding_scores(dim_zero_cat(self.embeddings), dim_zero_cat(self.targets))
        return {
            "cosine_to_frozen": scores["cosine"],
            "neighbours_of_frozen": scores["same_neighbours"],
        }


class MaskMetrics(Metric):
    """Measures of pysodmetrics, computed for each image at the size of its mask and averaged.

    They are the S-measure, the weighted F-measure (beta^2 = 1), the adaptive, mean and largest
    F-measure (beta^2 = 0.3) and E-measure, and the mean absolute error. The mean and largest values
    are those of the curve over thresholds, averaged over images.

    An image on which a measure is not defined (such as the S-measure of a mask one pixel high) is
    left out of that measure. An image with at most one pixel that is not ignored is left out of
    all. Ignored pixels are left out, except in the S-measure and the weighted F-measure. These
    depend on pixel positions, so there ignored pixels count as outside and correctly predicted.
    """

    full_state_update = False
    scalars: Tensor
    defined: Tensor
    curves: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # scalars: sums of S, weighted F, adaptive F, adaptive E and absolute error; defined: number
        # of images in each sum; curves: sums of the F and E curves; count: number of images.
        self.add_state("scalars", torch.zeros(5), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(5), dist_reduce_fx="sum")
        self.add_state("curves", torch.zeros(2, _THRESHOLDS), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Add logits [B, 1, h, w] and their masks [H, W] of 0, 1 and `IGNORED`, of any sizes."""
        for image_logits, mask in zip(logits, targets, strict=True):
            if (mask != IGNORED).sum() <= 1:
                continue
            probability = image_logits.unsqueeze(0).float().sigmoid()
            resized = resize_maps(probability, mask.shape)[0, 0]
            grey = (resized * 255).round().byte().cpu().numpy()
            scalars, curves = _measures(grey, mask.cpu().numpy())
            values = torch.from_numpy(scalars).to(self.scalars)
            self.scalars += values.nan_to_num()
            self.defined += values.isfinite()
            self.curves += torch.from_numpy(curves).to(self.curves)
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Return each measure by its name; the first one, the S-measure, selects the best epoch."""
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
    """Return scalars [5], NaN where not defined, and curves [2, 256] of one image.

    Args:
        grey: Predicted probability times 255, [H, W] uint8.
        mask: Target [H, W]: 1 inside, 0 outside, `IGNORED` at ignored pixels.
    """
    import py_sod_metrics as sod

    counted, inside = mask != IGNORED, (mask == 1).astype(np.uint8) * 255
    # For measures that depend on positions: ignored pixels are outside in prediction and target.
    whole = np.where(counted, grey, grey[counted].min()), inside
    # For the other measures: the pixels that are not ignored, as an image one pixel high.
    row = (grey, inside) if counted.all() else (grey[counted][None], inside[counted][None])
    with warnings.catch_warnings():
        # Fmeasure warns that it will be removed; its replacement is not in all releases.
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
