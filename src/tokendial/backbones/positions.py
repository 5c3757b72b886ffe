"""Position embeddings for images of another size than the released ones."""

import math

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor


def resized_positions(
    pos_embed: Tensor, grid: tuple[int, int], *, num_prefix_tokens: int = 1, offset: float = 0.0
) -> Tensor:
    """Positions [1, N, D] of a square grid of patches, resized bicubically to another grid.

    Args:
        pos_embed: Those of the prefix tokens first.
        grid: Rows and columns of patches.
        num_prefix_tokens: Tokens that have positions but no place.
        offset: 0: with antialiasing, as timm, and as DINOv2 with registers and DAR do. DINOv2
            without registers was released with 0.1, added to the number of patches before it is
            divided by the old one, and without antialiasing; features of other image sizes equal
            the published ones only with the same.
    """
    if not offset:
        resized: Tensor = resample_abs_pos_embed(
            pos_embed, list(grid), num_prefix_tokens=num_prefix_tokens
        )
        return resized
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return pos_embed
    square = patches.float().transpose(1, 2).reshape(1, -1, side, side)
    factors = [(length + offset) / side for length in grid]
    moved = F.interpolate(square, scale_factor=factors, mode="bicubic")
    return torch.cat([prefix, moved.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
