"""Dense prediction (logits for every pixel): the base of binary masks and segmentation."""

# Shape legend: B batch, K logit maps, H and W pixels of the image that the model sees.

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy
from tokendial.compensate.distillation import binary_distillation, soft_distillation
from tokendial.data.transforms.masks import (
    InputFormat,
    MaskAugment,
    MaskEvalTransform,
    MaskImageTransform,
    MaskTrainTransform,
)
from tokendial.model.dial import InferenceModel
from tokendial.model.windows import predict_windows


class DensePrediction:
    """Base class of tasks with masks: transforms, and inference on whole images or in windows."""

    score_name = "accuracy"
    mask_padding: int
    """Value of a mask where a small image is padded."""

    def __init__(self, num_classes: int, augment: MaskAugment) -> None:
        """Set up the task.

        Args:
            num_classes: Number of logit maps.
            augment: How images and masks are augmented, and how test images are prepared.
        """
        self.num_classes, self.augment = num_classes, augment

    def eval_batch_size(self, batch_size: int) -> int:
        """Return 1 if test images keep different sizes (`test: slide`), else `batch_size`."""
        return 1 if self.augment.test == "slide" else batch_size

    def train_transform(self, anatomy: Anatomy) -> MaskTrainTransform:
        """Return the random transform of a training image and its mask."""
        return MaskTrainTransform(self.augment, input_format(anatomy), self.mask_padding)

    def eval_transform(self, anatomy: Anatomy) -> MaskEvalTransform:
        """Return the transform of a test image; masks keep their size unless images are cropped."""
        return MaskEvalTransform(self.augment, input_format(anatomy), self.mask_padding)

    def image_transform(self, anatomy: Anatomy) -> MaskImageTransform:
        """Return the transform of an image that has no mask."""
        return MaskImageTransform(self.augment, input_format(anatomy))

    def mix_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch as it is."""
        return images, targets

    def batch_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the masks as they are."""
        return targets

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence, mean over images and positions.

        Args:
            student: Logits [B, K, h, w]; of a single map, the sigmoids are compared.
            teacher: Logits of the same shape.
        """
        if student.shape[1] == 1:
            return binary_distillation(student, teacher)
        rows = [logits.movedim(1, -1).flatten(0, -2) for logits in (student, teacher)]
        return soft_distillation(*rows, mean_over="batch")

    def predict(self, model: InferenceModel, images: Tensor) -> Tensor:
        """Return logits [B, K, h, w] at the decoder's resolution, or [B, K, H, W] from windows.

        Args:
            model: Model with a decoder.
            images: Images [B, 3, H, W] of the model's input size, or larger with `test: slide`.
        """
        if self.augment.test != "slide":
            logits: Tensor = model(images)
            return logits
        return predict_windows(model, images, model.anatomy.image_size, self.augment.stride)


def resize_maps(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Return maps [B, K, h, w] resized bilinearly to a height and width."""
    return F.interpolate(maps, tuple(size), mode="bilinear")


def best_class(logits_Khw: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Return the index of the largest of K logit maps at another size, [H, W] uint8.

    The maps are resized one by one, because all K at the size of a large photo might not fit in
    memory.
    """
    best = resize_maps(logits_Khw[None, :1], size)[0, 0]
    index = torch.zeros_like(best, dtype=torch.uint8)
    for number in range(1, len(logits_Khw)):
        other = resize_maps(logits_Khw[None, number : number + 1], size)[0, 0]
        index[other > best] = number
        best = torch.maximum(best, other, out=best)
    return index


def input_format(anatomy: Anatomy) -> InputFormat:
    """Return the size and normalisation of the images that a model takes."""
    return InputFormat(anatomy.image_size, *anatomy.statistics)
