"""Transforms of training and test images, built from those of torchvision and timm."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

_MAX_CROP_ASPECT, _MAX_RESIZE_ASPECT = 8, 100
"""Aspect ratios above which `ResizeAndCrop` and `ResizeImage` take a way that saves memory."""
_FILTER_REACH = 3
"""Pixels that bicubic interpolation reads on either side (2), and one more for rounding."""
Transform = Callable[[Any], Tensor]
"""Function from a PIL image to [3, H, W], or from a video to a clip or its views."""
PairTransform = Callable[[Any, Any], tuple[Tensor, Any]]
"""Function from a sample and its target to the prepared sample and target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How training images are augmented, and how test images are cropped."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    crop: bool = True
    """Whether training images are random crops (RandomResizedCrop); false resizes the whole image
    to the input size."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest fraction of the image area that a random crop covers."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip in training, for pictures without an up and a down."""
    randaugment: str | None = None
    """RandAugment policy in timm's notation, such as "rand-m9-mstd0.5-inc1"; null is none."""
    color_jitter: float = 0.0
    """Strength of the random change of brightness, contrast and saturation in training; 0 is
    none."""
    erasing: float = 0.0
    """Probability that a random rectangle of a training image is erased."""
    mixup: float = 0.0
    """Parameter alpha of mixup (the beta distribution of the mixing weights); 0 is no mixup."""
    cutmix: float = 0.0
    """Parameter alpha of cutmix (the beta distribution of the mixed areas); 0 is no cutmix."""
    smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in [0, 1)."""
    test_crop_ratio: float = 0.875
    """Side of the centre crop of a test image as a fraction of the image's short side, in (0, 1]; 1
    resizes the whole image without a crop."""

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "erasing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("color_jitter", "mixup", "cutmix"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}.")
        if not 0.0 < self.test_crop_ratio <= 1.0:
            raise ValueError(f"test_crop_ratio must lie in (0, 1], got {self.test_crop_ratio}.")
        if len(self.scale) != 2 or not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be two rising numbers in (0, 1], got {self.scale}.")
        if self.randaugment is not None:
            try:
                rand_augment_transform(self.randaugment, {})
            except (AssertionError, ValueError):  # timm checks by assert
                raise ValueError(
                    f"randaugment must look like rand-m9-mstd0.5-inc1, got {self.randaugment!r}."
                ) from None


def train_transform(
    augment: Augment,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    clips: bool = False,
) -> Transform:
    """Return the transform of training images: a PIL image to [3, H, W] float32, normalised.

    Args:
        augment: How images are augmented.
        img_size: Height and width of the result.
        mean: Mean of each channel for normalisation.
        std: Standard deviation of each channel for normalisation.
        clips: Whether to transform frames [T, 3, H, W] uint8, all of a clip in the same way, into
            float32 instead.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(img_size, augment.scale, interpolation=bicubic)
        if augment.crop
        else ResizeImage(img_size),
        v2.RandomHorizontalFlip(augment.flip),
    ]
    if augment.vertical_flip:
        steps.append(v2.RandomVerticalFlip(augment.vertical_flip))
    if augment.randaugment:
        fill = tuple(round(255 * channel) for channel in mean)
        hparams = {"translate_const": int(min(img_size) * 0.45), "img_mean": fill}
        draw = rand_augment_transform(augment.randaugment, hparams)
        steps.append(partial(_augment_frames_alike, draw) if clips else draw)
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    steps += to_tensor(mean, std)
    if augment.erasing:
        erase: Any = RandomErasing(augment.erasing, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
        steps.append(partial(_erase_frames_alike, erase) if clips else erase)
    composed: Transform = v2.Compose(steps)
    return composed


def _augment_frames_alike(draw: Callable[[Any], Any], frames: Tensor) -> Tensor:
    """Apply a random transform of PIL images to [T, 3, H, W] uint8, with one draw for all."""
    # timm draws from these two generators; each frame starts from the same states.
    state = random.getstate(), np.random.get_state()
    augmented = []
    for frame in frames:
        random.setstate(state[0])
        np.random.set_state(state[1])
        augmented.append(tvf.pil_to_tensor(draw(tvf.to_pil_image(frame))))
    return torch.stack(augmented)


def _erase_frames_alike(erase: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Erase the same rectangle of all frames [T, 3, H, W]; each frame gets its own noise."""
    return torch.unflatten(erase(frames.flatten(0, 1)), 0, frames.shape[:2])


def eval_transform(
    augment: Augment,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Transform:
    """Return the transform of test images: a PIL image to [3, H, W] float32, normalised.

    Args:
        augment: Gives `test_crop_ratio`; a model whose input is not square gets no crop.
        img_size: Height and width of the result.
        mean: Mean of each channel for normalisation.
        std: Standard deviation of each channel for normalisation.
    """
    if augment.test_crop_ratio == 1.0 or img_size[0] != img_size[1]:
        steps: list[Callable[[Any], Any]] = [ResizeImage(img_size)]
    else:
        short = round(img_size[0] / augment.test_crop_ratio)
        steps = [ResizeAndCrop(short, img_size)]
    composed: Transform = v2.Compose(steps + to_tensor(mean, std))
    return composed


class ResizeImage:
    """Resizes an image to a height and width, as `v2.Resize` does.

    Older versions of Pillow resize the width first. An image of a few pixels' width and a great
    height would become very large in between. Such an image is resized to its final height first
    here, as newer versions of Pillow do.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._resize = v2.Resize(size, v2.InterpolationMode.BICUBIC)

    def __call__(self, image: Any) -> Any:
        """Resize a PIL image, or frames [T, 3, H, W]."""
        if isinstance(image, Image.Image) and image.height > _MAX_RESIZE_ASPECT * image.width:
            rows = min(image.height, self.size[0])
            image = image.resize((image.width, rows), Image.Resampling.BICUBIC)
        return self._resize(image)


class ResizeAndCrop:
    """Resizes the short side of an image and crops the centre (`v2.Resize`, `v2.CenterCrop`).

    Of an image that is more than 8 times longer than wide, only the part in the crop is resized.
    The pixels are equal up to rounding, and the whole resized image might not fit in memory.
    """

    def __init__(self, short: int, size: tuple[int, int]) -> None:
        self.short, self.size = short, size
        self._whole = v2.Compose(
            [v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
        )

    def __call__(self, image: Any) -> Any:
        """Resize and crop a PIL image, or frames [T, 3, H, W]."""
        if not isinstance(image, Image.Image):
            return self._whole(image)
        sides = image.width, image.height
        if max(sides) <= _MAX_CROP_ASPECT * min(sides):
            return self._whole(image)
        target = self.size[::-1]
        pixels, box = zip(*map(self._source_interval, sides, target, [min(sides)] * 2), strict=True)
        image = image.crop((pixels[0][0], pixels[1][0], pixels[0][1], pixels[1][1]))
        corners = (box[0][0], box[1][0], box[0][1], box[1][1])
        return image.resize(target, Image.Resampling.BICUBIC, box=corners)

    def _source_interval(
        self, side: int, target: int, shortest: int
    ) -> tuple[tuple[int, int], tuple[float, float]]:
        """Return, along one side, the pixels to read and the interval in them that the crop covers.

        Args:
            side: Length of the side of the image.
            target: Length of the side of the crop.
            shortest: Length of the short side of the image.
        """
        # torchvision rounds the resized length down and the first pixel to the nearest integer.
        length = int(self.short * side / shortest)
        first, scale = round((length - target) / 2.0), side / length
        begin, end = first * scale, (first + target) * scale
        around = _FILTER_REACH * max(1.0, scale)
        left, right = max(0, math.floor(begin - around)), min(side, math.ceil(end + around))
        return (left, right), (begin - left, end - left)


def on_image(transform: Transform) -> PairTransform:
    """Return a transform of pairs that applies `transform` and leaves the target as it is."""
    return partial(_on_image, transform)


def _on_image(transform: Transform, image: Any, target: Any) -> tuple[Tensor, Any]:
    return transform(image), target


def to_tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Callable[[Any], Any]]:
    """Return the last steps of every transform, which give [3, H, W] float32, normalised."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
