"""Large images in overlapping windows: at each pixel, the mean over the windows that cover it."""

# Shape legend: B batch, K logit maps, H and W pixels.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def predict_windows(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: float,
    *,
    windows_per_pass: int = 8,
) -> Tensor:
    """Return logits [B, K, H, W]: at each pixel the mean over the windows that cover it.

    Args:
        model: Gives logits [B, K, h, w] of windows, such as a model with a decoder.
        images: Images [B, 3, H, W], at least as large as a window.
        window: Height and width of a window.
        stride: Distance between two windows as a fraction of the window; the last window ends at
            the border of the image.
        windows_per_pass: Number of windows in one forward pass.

    Raises:
        ValueError: If the images are smaller than a window.
    """
    height, width = images.shape[-2:]
    if height < window[0] or width < window[1]:
        raise ValueError(f"images must be at least {window}, got ({height}, {width}).")
    corners = [
        (top, left)
        for top in window_starts(height, window[0], stride)
        for left in window_starts(width, window[1], stride)
    ]
    sums, counts = None, images.new_zeros(1, 1, height, width)
    for first in range(0, len(corners), windows_per_pass):
        batch = corners[first : first + windows_per_pass]
        parts = [images[..., y : y + window[0], x : x + window[1]] for y, x in batch]
        logits = F.interpolate(model(torch.cat(parts)), window, mode="bilinear")
        if sums is None:
            sums = logits.new_zeros(len(images), logits.shape[1], height, width)
        for (y, x), part in zip(batch, torch.unflatten(logits, 0, (len(batch), -1)), strict=True):
            sums[..., y : y + window[0], x : x + window[1]] += part
            counts[..., y : y + window[0], x : x + window[1]] += 1
    assert sums is not None  # there is at least one window
    return sums / counts


def window_starts(length: int, window: int, stride: float) -> list[int]:
    """Return the first pixel of each window along a side."""
    step = max(1, round(stride * window))
    return sorted({min(start, length - window) for start in range(0, length - window + step, step)})
