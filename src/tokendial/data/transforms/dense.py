"""Transforms of images together with their masks."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from tokendial.data.transforms.image import to_tensor

_BILINEAR = v2.InterpolationMode.BILINEAR
_TEST_WIDTH = 682 / 518
"""DAR's test images may be that much longer than they are cropped to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseAugment:
    """How images and masks are varied in training, and how test images are seen."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    keep_aspect: bool = False
    """Whether training images keep their proportions; False: stretched to the model's."""
    scale: tuple[float, float] = (1.0, 1.333)
    """Smallest and largest size, in sizes of the model, before the random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of the jitter of brightness, contrast and saturation."""
    test: Literal["whole", "crop", "slide"] = "whole"
    """How test images are seen. whole: stretched to the model's size, and the result stretched
    back; slide: in windows of the model's size that overlap, on the image with its short side
    brought to the model's; crop: the middle alone, image and mask, as in DAR's code: the short side
    is at most the model's, the long one at most 682/518 of it, and what is missing is black, right
    and below."""
    stride: float = 2 / 3
    """Distance of two windows, in windows; with `test` slide."""

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two rising numbers above 0, got {self.scale}.")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must lie in [0, 1], got {self.flip}.")
        if not self.color_jitter >= 0.0:
            raise ValueError(f"color_jitter must be at least 0, got {self.color_jitter}.")
        if self.test not in ("whole", "crop", "slide"):
            raise ValueError(f"test must be one of whole, crop, slide, got {self.test!r}.")
        if not 0.0 < self.stride <= 1.0:
            raise ValueError(f"stride must lie in (0, 1], got {self.stride}.")


@dataclass(frozen=True, slots=True)
class Frame:
    """What images a model takes."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Of the normalisation."""
    std: tuple[float, ...]
    """Of the normalisation."""

    def finish(self, image: Any) -> Tensor:
        """[3, H, W] float32, normalised."""
        tensor: Tensor = v2.Compose(to_tensor(self.mean, self.std))(image)
        return tensor


@dataclass(frozen=True, slots=True)
class DenseTrainTransform:
    """From a PIL image and a mask to [3, H, W] float32, normalised, and int64 [H, W]."""

    augment: DenseAugment
    frame: Frame
    outside: int
    """Value of the mask where a small image is padded."""

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Vary one pair."""
        augment, frame = self.augment, self.frame
        factor = float(torch.empty(()).uniform_(*augment.scale))
        size = [round(factor * side) for side in frame.size]
        if augment.keep_aspect:
            size = _covering(image, size)
        jitter = augment.color_jitter
        steps = v2.Compose(
            [
                v2.Resize(size, _BILINEAR),
                v2.RandomCrop(
                    frame.size,
                    pad_if_needed=True,
                    fill={tv_tensors.Mask: self.outside, Image.Image: 0},
                ),
                v2.RandomHorizontalFlip(augment.flip),
                v2.ColorJitter(jitter, jitter, jitter),
            ]
        )
        image, target = steps(image, tv_tensors.Mask(mask))
        return frame.finish(image), target.as_subclass(Tensor).long()


@dataclass(frozen=True, slots=True)
class DenseImageTransform:
    """From a PIL image to [3, H, W], all of it, as `test` says; "crop" sees it as "whole" does."""

    augment: DenseAugment
    frame: Frame

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize and normalise."""
        size = list(self.frame.size)
        if self.augment.test == "slide":
            size = _covering(image, size)
        return self.frame.finish(v2.Resize(size, _BILINEAR)(image))


@dataclass(frozen=True, slots=True)
class DenseEvalTransform:
    """From a PIL image and a mask to [3, H, W] and the mask at its own size, without chance."""

    augment: DenseAugment
    frame: Frame
    outside: int
    """Value of the mask where a small image is padded before it is cropped."""

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Prepare one pair."""
        target = tv_tensors.Mask(mask)
        if self.augment.test != "crop":
            seen = DenseImageTransform(self.augment, self.frame)(image)
            return seen, target.as_subclass(Tensor).long()
        wanted = list(self.frame.size)
        size = _fitting(image, self.frame.size)
        image, target = v2.Resize(size, _BILINEAR)(image, target)
        # The authors' code pads right and below; torchvision's center_crop would pad around.
        rows, columns = (max(0, side - have) for side, have in zip(wanted, size, strict=True))
        padding = [0, 0, columns, rows]
        image = tvf.center_crop(tvf.pad(image, padding), wanted)
        target = tvf.center_crop(tvf.pad(target, padding, fill=self.outside), wanted)
        return self.frame.finish(image), target.as_subclass(Tensor).long()


def _covering(image: Image.Image, size: list[int]) -> list[int]:
    """Height and width of the image in its proportions, just covering `size`."""
    factor = max(size[0] / image.height, size[1] / image.width)
    return [max(size[0], round(factor * image.height)), max(size[1], round(factor * image.width))]


def _fitting(image: Image.Image, size: tuple[int, int]) -> list[int]:
    """Height and width of the image in its proportions, short side at most `size`, long side at
    most 682/518 of it."""
    short, long = min(image.size), max(image.size)
    factor = min(min(size) / short, _TEST_WIDTH * max(size) / long)
    return [max(1, int(factor * side + 0.5)) for side in (image.height, image.width)]
