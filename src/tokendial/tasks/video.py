"""Video classification: trains on clips, and averages several views of a video in tests."""

# Shape legend: B videos, V views, T frames, H and W pixels.

import math
from collections.abc import Sequence
from dataclasses import replace

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
from tokendial.model.dial import InferenceModel
from tokendial.tasks.classification import Classification, ClassMetric


class VideoClassification(Classification):
    """Classification of videos with one label each."""

    def __init__(
        self,
        num_classes: int,
        *,
        augment: Augment,
        clip: Clip,
        metrics: Sequence[ClassMetric] | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Set up the task.

        Args:
            num_classes: Number of classes.
            augment: How clips are augmented, all frames of a clip in the same way, and mixed.
                `test_crop_ratio` is not used.
            clip: Which frames form a clip, and how many views of a video a test averages.
            metrics: Metrics of an evaluation; see `Classification`.
            class_weights: Weight of each class in the loss; see `Classification`.

        Raises:
            ValueError: If `augment.test_crop_ratio` is set, which `clip.test_crops` replaces, or
                metrics or class weights do not fit the number of classes.
        """
        super().__init__(
            num_classes,
            multi_label=False,
            augment=augment,
            metrics=metrics,
            class_weights=class_weights,
        )
        if augment.test_crop_ratio != Augment().test_crop_ratio:
            raise ValueError(
                "augment.test_crop_ratio is for images: for videos set clip.test_crops instead, "
                f"got {augment.test_crop_ratio}."
            )
        self.clip = clip

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the random transform of a video to a clip [T, 3, H, W]; labels do not change."""
        size, (mean, std) = anatomy.image_size, anatomy.statistics
        augment = train_transform(self.augment, size, mean, std, clips=True)
        return on_image(ClipTrainTransform(self.clip, _num_frames(anatomy), augment))

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """Return the transform of a video to its views [V, T, 3, H, W]."""
        size, statistics = anatomy.image_size, anatomy.statistics
        return ClipTestTransform(self.clip, _num_frames(anatomy), size, *statistics)

    def clip_transform(self, anatomy: Anatomy) -> Transform:
        """Return the transform of a video to one clip [T, 3, H, W]: the middle view."""
        one_view = replace(self.clip, test_clips=1, test_crops=1)
        size, statistics = anatomy.image_size, anatomy.statistics
        views = ClipTestTransform(one_view, _num_frames(anatomy), size, *statistics)
        return lambda video: views(video)[0]

    def eval_batch_size(self, batch_size: int) -> int:
        """Return how many videos have together as many views as a training batch has clips."""
        return max(1, batch_size // self.clip.views)

    def predict(self, model: InferenceModel, views_BVT3HW: Tensor) -> Tensor:
        """Return the logarithm of the mean probabilities over the views, as logits [B, classes]."""
        logits: Tensor = model(views_BVT3HW.flatten(0, 1))
        each = torch.unflatten(logits.float().log_softmax(-1), 0, views_BVT3HW.shape[:2])
        return each.logsumexp(1) - math.log(each.shape[1])

    def mix_batch(self, clips_BT3HW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix to clips; all frames of a clip are mixed in the same way."""
        # timm's cutmix expects height and width on axes 2 and 3: frames are merged with channels.
        images, targets = super().mix_batch(clips_BT3HW.flatten(1, 2), targets)
        return torch.unflatten(images, 1, clips_BT3HW.shape[1:3]), targets


def _num_frames(anatomy: Anatomy) -> int:
    if anatomy.frames is None:
        raise ValueError("videos need a model that takes clips, but this one takes images.")
    return anatomy.frames
