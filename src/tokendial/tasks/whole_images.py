"""The base of tasks whose input is one image of the model's size: transforms and inference."""

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
from tokendial.model.dial import InferenceModel


class WholeImages:
    """Base class of classification and embeddings: an image becomes one input of the model."""

    augment: Augment
    """How images are augmented and cropped."""

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the random transform of a training image; its target stays as it is."""
        return on_image(train_transform(self.augment, anatomy.image_size, *anatomy.statistics))

    def eval_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the transform of a test image; its target stays as it is."""
        return on_image(self.image_transform(anatomy))

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """Return the transform of an image that has no target."""
        return eval_transform(self.augment, anatomy.image_size, *anatomy.statistics)

    def eval_batch_size(self, batch_size: int) -> int:
        """Return the training batch size: all images have one size."""
        return batch_size

    def predict(self, model: InferenceModel, images: Tensor) -> Tensor:
        """Return what the model gives: logits [B, num_classes], or embeddings [B, D]."""
        logits: Tensor = model(images)
        return logits
