"""Resize position embeddings to other image sizes."""

import math

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor


def resize_positions(
    pos_embed: Tensor,
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    offset: float = 0.0,
    antialias: bool = True,
) -> Tensor:
    """Resize the positions [1, N, D] of a square patch grid bicubically to another grid.

    Args:
        pos_embed: Positions, those of the prefix tokens first.
        grid: New rows and columns of patches.
        num_prefix_tokens: Number of prefix tokens, whose positions are kept.
        offset: 0 resizes to the size of the grid. DINOv2 without registers adds 0.1 to the new
            number of patches when it computes the scale, and uses no antialiasing; its published
            features need the same offset.
        antialias: Whether to resize with antialiasing, as timm, DINOv2 with registers and DAR do.
            False resizes without, as transformers' Dinov2 does. An offset implies False.
    """
    if antialias and not offset:
        resized: Tensor = resample_abs_pos_embed(
            pos_embed, list(grid), num_prefix_tokens=num_prefix_tokens
        )
        return resized
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return pos_embed
    square = patches.float().transpose(1, 2).reshape(1, -1, side, side)
    if offset:
        factors = [(length + offset) / side for length in grid]
        moved = F.interpolate(square, scale_factor=factors, mode="bicubic")
    else:
        moved = F.interpolate(square, size=grid, mode="bicubic")
    return torch.cat([prefix, moved.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
