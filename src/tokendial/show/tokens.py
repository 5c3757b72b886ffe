"""Where the patches of one image go: token maps, and images painted by them.

This module does not import matplotlib, so that servers can use it.
"""

# Shape legend: N tokens, P patches, H and W pixels.

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendial.model.dial_vit import DialViT

_DARKENED = 0.2
"""Brightness that is left of a patch that was dropped or skipped, as a fraction."""
_TINT = 0.5
"""Weight of a merged token's own colour; the rest is the mean of its patches."""
_OUTLINE = np.array([255, 255, 255], dtype=np.uint8)
_HUE_STEP = 0.618034
"""Golden ratio: tokens with consecutive numbers get hues that lie far apart."""


@dataclass(frozen=True, slots=True)
class TokenMaps:
    """Which token holds each patch of one image, after every layer."""

    origin: tuple[np.ndarray, ...]
    """For each layer, [rows, columns]: the index of the token that holds each patch; -1 where the
    patch was dropped, or where the FFN skipped it."""
    num_tokens: tuple[int, ...]
    """For each layer: the tokens that leave it, prefix tokens included. For methods that skip FFNs:
    the tokens that its FFN processed."""
    reduces: tuple[bool, ...]
    """For each layer: whether it merges, drops or skips tokens."""
    class_attention: np.ndarray | None
    """[rows, columns]: attention of the class token to each patch in the last layer. The attention
    to a merged token is divided evenly among its patches. None if there is no class token."""


@torch.no_grad()
def token_maps(model: DialViT, image: Tensor) -> TokenMaps:
    """Follow the patches of one image through the model, at its present degree.

    Args:
        model: A wrapped model. Its training mode is restored.
        image: [3, H, W], normalised.
    """
    training = model.training
    model.eval()
    needs = frozenset({"class_attention"} if model.anatomy.shape.has_class_token else ())
    origins, counts, reduces, class_attention_P = [], [], [], None
    count_before = 0
    for step in model.steps(image.unsqueeze(0), track=True, needs=needs):
        tokens, entered = step.tokens, step.entered
        assert tokens.origin is not None
        assert entered is not None
        assert entered.origin is not None
        patches = tokens.grid[0] * tokens.grid[1]
        origin_P, count = tokens.origin[0, -patches:], tokens.x.shape[1]
        count_before = count_before or tokens.prefix + patches
        if tokens.selected is not None:
            processed = tokens.selected[0] > 0
            origin_P = origin_P.masked_fill(~processed[tokens.prefix :], -1)
            count = int(processed.sum())
        origins.append(origin_P.reshape(tokens.grid).cpu().numpy())
        counts.append(count)
        reduces.append(count < count_before)
        count_before = tokens.x.shape[1]
        if step.attended.class_attention is not None:
            attention_N = step.attended.class_attention[0].float()
            class_attention_P = _per_patch(attention_N, entered.origin[0, -patches:])
    model.train(training)
    return TokenMaps(
        origin=tuple(origins),
        num_tokens=tuple(counts),
        reduces=tuple(reduces),
        class_attention=None
        if class_attention_P is None
        else class_attention_P.reshape(tokens.grid).cpu().numpy(),
    )


def _per_patch(attention_N: Tensor, origin_P: Tensor) -> Tensor:
    """Divide the attention to each token evenly among its patches. Dropped patches get 0."""
    kept = origin_P >= 0
    patches_N = torch.bincount(origin_P[kept], minlength=attention_N.numel())
    return (attention_N / patches_N.clamp(min=1))[origin_P.clamp(min=0)] * kept


def input_pixels(model: DialViT, image: Tensor) -> np.ndarray:
    """Undo the normalisation of a model's input, so that it can be shown.

    Args:
        model: The model that the image was prepared for.
        image: [3, H, W], normalised.

    Returns:
        [H, W, 3] uint8.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in model.anatomy.statistics)
    pixels = (image.cpu() * std + mean) * 255
    rounded: np.ndarray = pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return rounded


def paint_tokens(pixels: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Paint an image so that patches of the same token can be seen.

    The patches of a merged token are filled with their mean colour, tinted in a colour of its own
    (so that tokens differ on grey images, too), and get a white outline. A patch that is a token of
    its own stays as it is. Dropped and skipped patches are dark.

    Args:
        pixels: [H, W, 3] uint8. H and W must be divisible by the rows and columns of `origin`.
        origin: [rows, columns]: index of the token that holds each patch, or -1, as in `TokenMaps`.

    Returns:
        [H, W, 3] uint8.
    """
    height, width = pixels.shape[0] // origin.shape[0], pixels.shape[1] // origin.shape[1]
    token_of_pixel = origin.repeat(height, axis=0).repeat(width, axis=1)
    painted = pixels.copy()
    merged = np.zeros(token_of_pixel.shape, dtype=bool)
    for token in np.unique(origin):
        inside = token_of_pixel == token
        if token < 0:
            painted[inside] = (pixels[inside] * _DARKENED).astype(np.uint8)
        elif inside.sum() > height * width:
            merged |= inside
            mean = pixels[inside].mean(axis=0)
            color = _token_color(int(token))
            painted[inside] = ((1 - _TINT) * mean + _TINT * color).astype(np.uint8)
    for axis in (0, 1):
        differs = np.roll(token_of_pixel, -1, axis) != token_of_pixel
        outline = differs & (merged | np.roll(merged, -1, axis))
        last: tuple[slice | int, ...] = (-1,) if axis == 0 else (slice(None), -1)
        outline[last] = False  # roll compares the last row (or column) with the first one
        painted[outline] = _OUTLINE
    return painted


def _token_color(token: int) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(token * _HUE_STEP % 1.0, 0.85, 1.0)
    return 255 * np.array(rgb)
