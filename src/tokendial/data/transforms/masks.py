"""Transforms of images together with their masks, for dense prediction (a label per pixel)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from tokendial.checks import check_choice
from tokendial.data.transforms.image import to_tensor

_BILINEAR = v2.InterpolationMode.BILINEAR
_MAX_TEST_ASPECT = 682 / 518
"""Largest long side of a test image with `test: crop`, in sides of the crop (DAR's code)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskAugment:
    """How images and masks are augmented in training, and how test images are prepared."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    keep_aspect: bool = False
    """Whether training images keep their proportions; false stretches them to the model's."""
    scale: tuple[float, float] = (1.0, 1.333)
    """Smallest and largest factor by which a training image is larger than the model's input before
    the random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    color_jitter: float = 0.0
    """Strength of the random change of brightness, contrast and saturation in training; 0 is
    none."""
    test: Literal["whole", "crop", "slide"] = "whole"
    """How the model sees test images. whole: stretched to the model's input size, and its output
    stretched back; slide: in overlapping windows of the input size, after the short side is resized
    to it; crop: the centre of image and mask only, as in DAR's code (the image is resized so that
    its short side is at most the input size and its long side at most 682/518 of it, then padded
    with black on the right and below where it is smaller)."""
    stride: float = 2 / 3
    """Distance between two windows with `test: slide`, as a fraction of the window, in (0, 1]."""

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two rising numbers above 0, got {self.scale}.")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must lie in [0, 1], got {self.flip}.")
        if not self.color_jitter >= 0.0:
            raise ValueError(f"color_jitter must be at least 0, got {self.color_jitter}.")
        check_choice("test", self.test, ("whole", "crop", "slide"))
        if not 0.0 < self.stride <= 1.0:
            raise ValueError(f"stride must lie in (0, 1], got {self.stride}.")


@dataclass(frozen=True, slots=True)
class InputFormat:
    """Size and normalisation of the images that a model takes."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel that normalisation subtracts."""
    std: tuple[float, ...]
    """Standard deviation of each channel by which normalisation divides."""

    def normalise(self, image: Any) -> Tensor:
        """Return a PIL image as [3, H, W] float32, normalised; its size stays as it is."""
        tensor: Tensor = v2.Compose(to_tensor(self.mean, self.std))(image)
        return tensor


@dataclass(frozen=True, slots=True)
class MaskTrainTransform:
    """Augments a PIL image and its mask: [3, H, W] float32, normalised, and [H, W] int64."""

    augment: MaskAugment
    """How the pair is augmented."""
    input_format: InputFormat
    """Size and normalisation of the result."""
    mask_padding: int
    """Value of the mask where the image is smaller than the crop and is padded."""

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Resize, crop, flip and jitter image and mask together."""
        augment, input_size = self.augment, self.input_format.size
        factor = float(torch.empty(()).uniform_(*augment.scale))
        size = [round(factor * side) for side in input_size]
        if augment.keep_aspect:
            size = _covering_size(image, size)
        jitter = augment.color_jitter
        steps = v2.Compose(
            [
                v2.Resize(size, _BILINEAR),
                v2.RandomCrop(
                    input_size,
                    pad_if_needed=True,
                    fill={tv_tensors.Mask: self.mask_padding, Image.Image: 0},
                ),
                v2.RandomHorizontalFlip(augment.flip),
                v2.ColorJitter(jitter, jitter, jitter),
            ]
        )
        image, target = steps(image, tv_tensors.Mask(mask))
        return self.input_format.normalise(image), target.as_subclass(Tensor).long()


@dataclass(frozen=True, slots=True)
class MaskImageTransform:
    """Prepares a PIL image that has no mask: [3, H, W] float32, normalised.

    The whole image is kept, also with `test: crop`, where it is stretched as with `test: whole`.
    """

    augment: MaskAugment
    """How test images are prepared (`test`)."""
    input_format: InputFormat
    """Size and normalisation of the result."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize and normalise an image."""
        size = list(self.input_format.size)
        if self.augment.test == "slide":
            size = _covering_size(image, size)
        return self.input_format.normalise(v2.Resize(size, _BILINEAR)(image))


@dataclass(frozen=True, slots=True)
class MaskEvalTransform:
    """Prepares a PIL image and its mask for evaluation: [3, H, W] float32 and [H, W] int64.

    The mask keeps its own size, except with `test: crop`, where both are cropped.
    """

    augment: MaskAugment
    """How test images are prepared (`test`)."""
    input_format: InputFormat
    """Size and normalisation of the resulting image."""
    mask_padding: int
    """Value of the mask where a small image is padded before it is cropped."""

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Resize and normalise the image; crop both with `test: crop`."""
        target = tv_tensors.Mask(mask)
        if self.augment.test != "crop":
            tensor = MaskImageTransform(self.augment, self.input_format)(image)
            return tensor, target.as_subclass(Tensor).long()
        crop = list(self.input_format.size)
        size = _fitting_size(image, self.input_format.size)
        image, target = v2.Resize(size, _BILINEAR)(image, target)
        # DAR's code pads on the right and below; torchvision's center_crop alone pads on all sides.
        rows, columns = (max(0, side - have) for side, have in zip(crop, size, strict=True))
        padding = [0, 0, columns, rows]
        image = tvf.center_crop(tvf.pad(image, padding), crop)
        target = tvf.center_crop(tvf.pad(target, padding, fill=self.mask_padding), crop)
        return self.input_format.normalise(image), target.as_subclass(Tensor).long()


def _covering_size(image: Image.Image, size: list[int]) -> list[int]:
    """Return the smallest height and width that cover `size` in the proportions of the image."""
    factor = max(size[0] / image.height, size[1] / image.width)
    return [max(size[0], round(factor * image.height)), max(size[1], round(factor * image.width))]


def _fitting_size(image: Image.Image, size: tuple[int, int]) -> list[int]:
    """Return the largest allowed height and width in the proportions of the image.

    The short side is at most the short side of `size`, the long side at most 682/518 of its long
    side.
    """
    short, long = min(image.size), max(image.size)
    factor = min(min(size) / short, _MAX_TEST_ASPECT * max(size) / long)
    return [max(1, int(factor * side + 0.5)) for side in (image.height, image.width)]
