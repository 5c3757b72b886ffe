"""Image classification: loss and metrics, one label or several."""

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
    """Loss, batch-wise augmentation and metrics of a classification task."""

    def __init__(self, num_classes: int, *, multi_label: bool, augment: Augment) -> None:
        """Check that the settings fit the task.

        Args:
            num_classes: Number of logits.
            multi_label: Whether targets are float [B, num_classes] of 0 and 1.
            augment: Mixup, cutmix and label smoothing.

        Raises:
            ValueError: If mixup, cutmix or smoothing are asked for with several labels.
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
        """Vary an image."""
        return on_image(train_transform(self.augment, anatomy.image_size, *anatomy.statistics))

    def eval_transform(self, anatomy: Anatomy) -> PairTransform:
        """Prepare an image without chance."""
        return on_image(self.image_transform(anatomy))

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """The same for an image that has no label."""
        return eval_transform(self.augment, anatomy.image_size, *anatomy.statistics)

    def eval_batch(self, batch_size: int) -> int:
        """As many: all images have one size."""
        return batch_size

    def predict(self, model: DialViT | OptimizedViT, images: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        logits: Tensor = model(images)
        return logits

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the images of a training batch, an even number; targets become [B, num_classes]."""
        if self.mix is None:
            return images, targets
        images, targets = self.mix(images, targets)
        return images, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch; logits [B, num_classes]."""
        logits = logits.float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets)
        # Mixed targets have been smoothed already.
        smoothing = 0.0 if targets.is_floating_point() else self.augment.smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def metrics(self) -> Metrics:
        """Metrics over an evaluation set; the one named accuracy is what runs are judged by."""
        from tokendial.tasks.metrics import class_metrics

        return class_metrics(self.num_classes, multi_label=self.multi_label)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [B, num_classes]: independent ones with several labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of right answers in a training batch; for mixed targets, of the larger part."""
        if self.multi_label:
            return float(((logits > 0) == (targets > 0)).float().mean())
        if targets.is_floating_point():
            targets = targets.argmax(dim=1)
        return float((logits.argmax(dim=1) == targets).float().mean())
