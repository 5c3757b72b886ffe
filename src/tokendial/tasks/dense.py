"""What binary masks and semantic segmentation have in common."""

# Shape legend: B batch, K logit maps, H and W pixels of the image that the model sees.

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.transforms.dense import (
    DenseAugment,
    DenseEvalTransform,
    DenseImageTransform,
    DenseTrainTransform,
    Frame,
)
from tokendial.model.dial_vit import DialViT
from tokendial.tune import OptimizedViT


class DenseTask:
    """Transforms of images with masks, and inference on whole images or in windows."""

    outside: int
    """Value of a mask where there is no image."""

    def __init__(self, num_classes: int, augment: DenseAugment) -> None:
        self.num_classes, self.augment = num_classes, augment

    def eval_batch(self, batch_size: int) -> int:
        """One by one where images differ in size."""
        return 1 if self.augment.test == "slide" else batch_size

    def train_transform(self, anatomy: Anatomy) -> DenseTrainTransform:
        """Vary an image and its mask."""
        return DenseTrainTransform(self.augment, frame_of(anatomy), self.outside)

    def eval_transform(self, anatomy: Anatomy) -> DenseEvalTransform:
        """Prepare an image; its mask keeps its size, unless test images are cropped."""
        return DenseEvalTransform(self.augment, frame_of(anatomy), self.outside)

    def image_transform(self, anatomy: Anatomy) -> DenseImageTransform:
        """Prepare an image that has no mask."""
        return DenseImageTransform(self.augment, frame_of(anatomy))

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is mixed."""
        return images, targets

    def predict(self, model: DialViT | OptimizedViT, images: Tensor) -> Tensor:
        """Logits [B, K, h, w] at the decoder's resolution, or of windows put together [B, K, H, W].

        Args:
            model: With a decoder.
            images: [B, 3, H, W]; larger than the model's with `augment.test` slide.
        """
        if self.augment.test != "slide":
            logits: Tensor = model(images)
            return logits
        return slide(model, images, model.anatomy.image_size, self.augment.stride)


def slide(
    model: DialViT | OptimizedViT,
    images: Tensor,
    window: tuple[int, int],
    stride: float,
    *,
    most: int = 8,
) -> Tensor:
    """Logits [B, K, H, W], the mean of windows that overlap.

    Args:
        model: With a decoder.
        images: [B, 3, H, W], at least as large as a window.
        window: Height and width.
        stride: Distance of two windows, in windows; the last one ends at the border.
        most: Windows in one forward pass.

    Raises:
        ValueError: If an image is smaller than a window.
    """
    height, width = images.shape[-2:]
    if height < window[0] or width < window[1]:
        raise ValueError(f"images must be at least {window}, got ({height}, {width}).")
    corners = [
        (top, left)
        for top in _starts(height, window[0], stride)
        for left in _starts(width, window[1], stride)
    ]
    sums, counts = None, images.new_zeros(1, 1, height, width)
    for first in range(0, len(corners), most):
        some = corners[first : first + most]
        parts = [images[..., y : y + window[0], x : x + window[1]] for y, x in some]
        logits = F.interpolate(model(torch.cat(parts)), window, mode="bilinear")
        if sums is None:
            sums = logits.new_zeros(len(images), logits.shape[1], height, width)
        for (y, x), part in zip(some, torch.unflatten(logits, 0, (len(some), -1)), strict=True):
            sums[..., y : y + window[0], x : x + window[1]] += part
            counts[..., y : y + window[0], x : x + window[1]] += 1
    assert sums is not None  # there is always a window
    return sums / counts


def _starts(length: int, window: int, stride: float) -> list[int]:
    """Where windows begin along a side."""
    step = max(1, round(stride * window))
    return sorted({min(start, length - window) for start in range(0, length - window + step, step)})


def resize_map(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Maps [B, K, h, w], resized bilinearly."""
    return F.interpolate(maps, tuple(size), mode="bilinear")


def best_class(logits_Khw: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Index of the largest of K logit maps at another size, [H, W] uint8.

    The maps are enlarged one by one: all together would not fit in memory for large photographs.
    """
    best = resize_map(logits_Khw[None, :1], size)[0, 0]
    index = torch.zeros_like(best, dtype=torch.uint8)
    for number in range(1, len(logits_Khw)):
        other = resize_map(logits_Khw[None, number : number + 1], size)[0, 0]
        index[other > best] = number
        best = torch.maximum(best, other, out=best)
    return index


def frame_of(anatomy: Anatomy) -> Frame:
    """What images a model takes."""
    return Frame(anatomy.image_size, *anatomy.statistics)
