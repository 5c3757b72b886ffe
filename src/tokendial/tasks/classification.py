"""Image classification with one label for each image, or any number of labels."""

import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.transforms.image import (
    Augment,
    PairTransform,
    Transform,
    eval_transform,
    on_image,
    train_transform,
)
from tokendial.model.dial_vit import DialViT
from tokendial.tasks.base import Metrics
from tokendial.tune import OptimizedViT


class Classification:
    """Classification of images: transforms, mixup and cutmix, loss and metrics."""

    def __init__(self, num_classes: int, *, multi_label: bool, augment: Augment) -> None:
        """Check that the settings fit the task.

        Args:
            num_classes: Number of classes.
            multi_label: Whether an image can have any number of labels. Targets are then float32
                [B, num_classes] of 0 and 1, else class indices [B].
            augment: How images are augmented, mixed and cropped.

        Raises:
            ValueError: If mixup, cutmix or label smoothing is set with `multi_label`.
        """
        self.num_classes, self.multi_label, self.augment = num_classes, multi_label, augment
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

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the random transform of a training image; its label stays as it is."""
        return on_image(train_transform(self.augment, anatomy.image_size, *anatomy.statistics))

    def eval_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the transform of a test image; its label stays as it is."""
        return on_image(self.image_transform(anatomy))

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """Return the transform of an image that has no label."""
        return eval_transform(self.augment, anatomy.image_size, *anatomy.statistics)

    def eval_batch_size(self, batch_size: int) -> int:
        """Return the training batch size: all images have one size."""
        return batch_size

    def predict(self, model: DialViT | OptimizedViT, images: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        logits: Tensor = model(images)
        return logits

    def mix_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix to an even number of images; targets become [B, num_classes]."""
        if self.mix is None:
            return images, targets
        images, targets = self.mix(images, targets)
        return images, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch (binary cross-entropy with several labels)."""
        logits = logits.float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets)
        # timm's Mixup smooths the targets that it mixes.
        smoothing = 0.0 if targets.is_floating_point() else self.augment.smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def metrics(self) -> Metrics:
        """Return accuracy, and top-5 accuracy or (with several labels) mean average precision."""
        from tokendial.tasks.metrics import class_metrics

        return class_metrics(self.num_classes, multi_label=self.multi_label)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [B, num_classes]: softmax, or sigmoid with several labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    def batch_accuracy(self, logits: Tensor, targets: Tensor) -> float:
        """Return the training accuracy; a mixed target counts as its class of largest weight."""
        if self.multi_label:
            return float(((logits > 0) == (targets > 0)).float().mean())
        if targets.is_floating_point():
            targets = targets.argmax(dim=1)
        return float((logits.argmax(dim=1) == targets).float().mean())
