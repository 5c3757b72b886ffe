"""Video classification: clips to train on, and the mean over several views of a video to test."""

# Shape legend: B videos, V views, T frames, H and W pixels.

import math

import torch
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.transforms.clip import Clip, ClipTestTransform, ClipTrainTransform
from tokendial.data.transforms.image import (
    Augment,
    PairTransform,
    Transform,
    on_image,
    train_transform,
)
from tokendial.model.dial_vit import DialViT
from tokendial.tasks.classification import Classification
from tokendial.tune import OptimizedViT


class VideoClassification(Classification):
    """Classification of videos with one label each; `augment` is read but for `test_crop_ratio`."""

    def __init__(self, num_classes: int, *, augment: Augment, clip: Clip) -> None:
        """Set up the task.

        Args:
            num_classes: Number of logits.
            augment: How clips are varied, all frames of one alike; mixup, cutmix, smoothing.
            clip: Which frames are seen, and in how many views a video is tested.

        Raises:
            ValueError: If `augment` asks for crops of test images, which `clip` describes.
        """
        super().__init__(num_classes, multi_label=False, augment=augment)
        if augment.test_crop_ratio != Augment().test_crop_ratio:
            raise ValueError(
                "augment.test_crop_ratio is for images: views of videos are cut as "
                f"clip.test_crops says, got {augment.test_crop_ratio}."
            )
        self.clip = clip

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """From a video to a clip [T, 3, H, W]."""
        size, (mean, std) = anatomy.image_size, anatomy.statistics
        vary = train_transform(self.augment, size, mean, std, clips=True)
        return on_image(ClipTrainTransform(self.clip, _frames(anatomy), vary))

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """From a video to its views [V, T, 3, H, W]."""
        size, statistics = anatomy.image_size, anatomy.statistics
        return ClipTestTransform(self.clip, _frames(anatomy), size, *statistics)

    def eval_batch(self, batch_size: int) -> int:
        """So many videos have about as many views as a training batch has clips."""
        return max(1, batch_size // self.clip.views)

    def predict(self, model: DialViT | OptimizedViT, views_BVT3HW: Tensor) -> Tensor:
        """Logs of the mean probabilities over the views [B, num_classes], which serve as logits."""
        logits: Tensor = model(views_BVT3HW.flatten(0, 1))
        each = torch.unflatten(logits.float().log_softmax(-1), 0, views_BVT3HW.shape[:2])
        return each.logsumexp(1) - math.log(each.shape[1])

    def mixed(self, clips_BT3HW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the clips of a training batch, all frames of two clips alike."""
        # timm's cutmix takes the third and the fourth axis for the sides of the images.
        images, targets = super().mixed(clips_BT3HW.flatten(1, 2), targets)
        return torch.unflatten(images, 1, clips_BT3HW.shape[1:3]), targets


def _frames(anatomy: Anatomy) -> int:
    if anatomy.frames is None:
        raise ValueError("videos need a model that takes clips, but it takes images.")
    return anatomy.frames
