"""Transforms of training and test images: torchvision's and timm's own."""

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

_LONG, _HIGH = 8, 100
"""How many times longer than wide, or higher, an image is resized in another way."""
_REACH = 3
"""Pixels on either side that bicubic interpolation reads, and one more for rounding."""
Transform = Callable[[Any], Tensor]
"""From a PIL image to [3, H, W]."""
PairTransform = Callable[[Any, Any], tuple[Tensor, Any]]
"""The same, together with the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How training images are varied, and how test images are cut."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    crop: bool = True
    """Crop a random part (RandomResizedCrop); False: resize to the image size."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area that a random crop takes."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    randaugment: str | None = None
    """RandAugment in timm's notation, such as "rand-m9-mstd0.5-inc1"; None: off."""
    color_jitter: float = 0.0
    """Strength of the jitter of brightness, contrast and saturation."""
    erasing: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: off."""
    smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""
    test_crop_ratio: float = 0.875
    """Share of the short side that the centre crop of a test image takes; 1: no crop, resize."""

    def __post_init__(self) -> None:
        for name in ("flip", "erasing"):
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
            except (AssertionError, ValueError):  # timm asserts
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
    """From a PIL image to a varied, normalised [3, H, W] float32 tensor.

    With `clips` from frames [T, 3, H, W] uint8 to the same in float32, all of them varied alike.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(img_size, augment.scale, interpolation=bicubic)
        if augment.crop
        else Resized(img_size),
        v2.RandomHorizontalFlip(augment.flip),
    ]
    if augment.randaugment:
        fill = tuple(round(255 * channel) for channel in mean)
        hparams = {"translate_const": int(min(img_size) * 0.45), "img_mean": fill}
        draw = rand_augment_transform(augment.randaugment, hparams)
        steps.append(partial(_alike, draw) if clips else draw)
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    steps += to_tensor(mean, std)
    if augment.erasing:
        erase: Any = RandomErasing(augment.erasing, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
        steps.append(partial(_in_one_place, erase) if clips else erase)
    composed: Transform = v2.Compose(steps)
    return composed


def _alike(draw: Callable[[Any], Any], frames: Tensor) -> Tensor:
    """Vary each of [T, 3, H, W] uint8 by the same draw of a transform of PIL images."""
    state = random.getstate(), np.random.get_state()
    varied = []
    for frame in frames:
        # timm draws from these two.
        random.setstate(state[0])
        np.random.set_state(state[1])
        varied.append(tvf.pil_to_tensor(draw(tvf.to_pil_image(frame))))
    return torch.stack(varied)


def _in_one_place(erase: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Erase the same part of each of [T, 3, H, W], filled with noise of its own."""
    return torch.unflatten(erase(frames.flatten(0, 1)), 0, frames.shape[:2])


def eval_transform(
    augment: Augment,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Transform:
    """From a PIL image to a normalised [3, H, W] float32 tensor, without chance."""
    if augment.test_crop_ratio == 1.0 or img_size[0] != img_size[1]:
        steps: list[Callable[[Any], Any]] = [Resized(img_size)]
    else:
        short = round(img_size[0] / augment.test_crop_ratio)
        steps = [CentreCropped(short, img_size)]
    composed: Transform = v2.Compose(steps + to_tensor(mean, std))
    return composed


class Resized:
    """Resizes to [height, width], as `v2.Resize` does.

    Pillow resizes rows first, so that a few pixels wide and very high image would become as many
    rows as wide as the result. Its newer versions do it the other way round, as is done here.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._resize = v2.Resize(size, v2.InterpolationMode.BICUBIC)

    def __call__(self, image: Any) -> Any:
        """Resize a PIL image, or frames [T, 3, H, W]."""
        if isinstance(image, Image.Image) and image.height > _HIGH * image.width:
            rows = min(image.height, self.size[0])
            image = image.resize((image.width, rows), Image.Resampling.BICUBIC)
        return self._resize(image)


class CentreCropped:
    """Resizes the short side, and takes the centre, as `v2.Resize` and `v2.CenterCrop` do.

    Where an image is many times longer than wide, only the part that is taken is resized: its
    pixels are the same up to rounding, and the whole would be larger than any memory.
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
        if max(sides) <= _LONG * min(sides):
            return self._whole(image)
        wanted = self.size[::-1]
        part, box = zip(*map(self._along, sides, wanted, [min(sides)] * 2), strict=True)
        image = image.crop((part[0][0], part[1][0], part[0][1], part[1][1]))
        corners = (box[0][0], box[1][0], box[0][1], box[1][1])
        return image.resize(wanted, Image.Resampling.BICUBIC, box=corners)

    def _along(
        self, side: int, wanted: int, shortest: int
    ) -> tuple[tuple[int, int], tuple[float, float]]:
        """Along one side: which pixels are needed, and which of these the result covers."""
        # As torchvision rounds: the length down, the first pixel to the nearest.
        length = int(self.short * side / shortest)
        first, scale = round((length - wanted) / 2.0), side / length
        begin, end = first * scale, (first + wanted) * scale
        around = _REACH * max(1.0, scale)  # what the filter sees besides
        left, right = max(0, math.floor(begin - around)), min(side, math.ceil(end + around))
        return (left, right), (begin - left, end - left)


def on_image(transform: Transform) -> PairTransform:
    """The transform of a pair that leaves the target as it is."""
    return partial(_on_image, transform)


def _on_image(transform: Transform, image: Any, target: Any) -> tuple[Tensor, Any]:
    return transform(image), target


def to_tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Callable[[Any], Any]]:
    """The last steps of every transform: [3, H, W] float32, normalised."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
