"""Image classification with one label for each image, or any number of labels."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from tokendial.compensate.distillation import binary_distillation, soft_distillation
from tokendial.data.transforms.image import Augment
from tokendial.tasks.base import Metrics
from tokendial.tasks.whole_images import WholeImages

ClassMetric = Literal["accuracy", "accuracy_top5", "balanced_accuracy", "f1", "auroc"]
"""Name of a metric for images with one label."""


class Classification(WholeImages):
    """Classification of images: transforms, mixup and cutmix, loss and metrics."""

    score_name = "accuracy"

    def __init__(
        self,
        num_classes: int,
        *,
        multi_label: bool,
        augment: Augment,
        metrics: Sequence[ClassMetric] | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Check that the settings fit the task.

        Args:
            num_classes: Number of classes.
            multi_label: Whether an image can have any number of labels. Targets are then float32
                [B, num_classes] of 0 and 1, else class indices [B].
            augment: How images are augmented, mixed and cropped.
            metrics: Metrics of an evaluation; the first one selects the best epoch. None means
                accuracy, and top-5 accuracy (with more than 5 classes) or mean average precision
                (with `multi_label`).
            class_weights: Weight of each class in the loss. None weighs all classes alike.

        Raises:
            ValueError: If mixup, cutmix, label smoothing, metrics or class weights are set with
                `multi_label`, or metrics or class weights do not fit the number of classes.
        """
        self.num_classes, self.multi_label, self.augment = num_classes, multi_label, augment
        self._metric_names = None if metrics is None else tuple(metrics)
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self._check_classes()
        mixes = augment.mixup > 0 or augment.cutmix > 0
        if multi_label and (mixes or augment.smoothing):
            raise ValueError("augment: mixup, cutmix and smoothing need one label per image.")
        self.mix = (
            Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.smoothing,
                num_classes=num_classes,
            )
            if mixes
            else None
        )

    def _check_classes(self) -> None:
        """Raise a ValueError unless metrics and class weights fit the classes."""
        for name, value in (
            ("metrics", self._metric_names),
            ("train.class_weights", self.class_weights),
        ):
            if value is not None and self.multi_label:
                raise ValueError(
                    f"{name} must be null for data with several labels per image, got "
                    f"{list(value)}."
                )
        if "accuracy_top5" in (self._metric_names or ()) and self.num_classes <= 5:
            raise ValueError(
                "metrics: accuracy_top5 needs more than 5 classes, but the data have "
                f"{self.num_classes}."
            )
        weights = self.class_weights
        if weights is not None and len(weights) != self.num_classes:
            raise ValueError(
                f"train.class_weights must be {self.num_classes} numbers, one for each class, got "
                f"{len(weights)}."
            )

    def mix_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix to an even number of images; targets become [B, num_classes]."""
        if self.mix is None:
            return images, targets
        images, targets = self.mix(images, targets)
        return images, targets

    def batch_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the labels as they are."""
        return targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch (binary cross-entropy with several labels).

        With class weights, the terms of each class are multiplied by its weight. The sum is divided
        by the number of images, not by the sum of the weights, so that a small batch of heavy
        classes counts for more.
        """
        logits = logits.float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets)
        # timm's Mixup smooths the targets that it mixes.
        smoothing = 0.0 if targets.is_floating_point() else self.augment.smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        weight = logits.new_tensor(self.class_weights)
        losses = F.cross_entropy(
            logits, targets, weight, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence, mean over images.

        With several labels it is that of each label's sigmoid, mean over labels too.
        """
        if self.multi_label:
            return binary_distillation(student, teacher)
        return soft_distillation(student, teacher, mean_over="batch")

    def metrics(self) -> Metrics:
        """Return new metrics: those that were chosen, or else the usual ones."""
        from tokendial.tasks.metrics import class_metrics

        names = self._metric_names
        return class_metrics(self.num_classes, multi_label=self.multi_label, names=names)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [B, num_classes]: softmax, or sigmoid with several labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    def batch_score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the training accuracy; a mixed target counts as its class of largest weight."""
        if self.multi_label:
            return float(((logits > 0) == (targets > 0)).float().mean())
        if targets.is_floating_point():
            targets = targets.argmax(dim=1)
        return float((logits.argmax(dim=1) == targets).float().mean())
