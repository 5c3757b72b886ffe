"""Rotary positions of tokens that may have been reduced."""

# Shape legend: B batch, H heads, N tokens, L patch tokens, C head_dim.

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from tokendial.tokens import Tokens


def rotate_patches(tokens: Tokens, table: Tensor, x_BHNC: Tensor, *, half: bool) -> Tensor:
    """Rotate queries or keys of the patch tokens by their positions; prefix tokens have none.

    Args:
        tokens: Their `position` says which row of the table each patch token has.
        table: Sines and cosines of the image's patches, [L, 2 * C] or for each head [H, L, 2 * C].
        x_BHNC: Queries or keys.
        half: Whether feature c is rotated together with c + C / 2 instead of its neighbour.
    """
    if tokens.position is not None:
        of_heads = table.ndim == 3
        table = table[..., tokens.position, :]
        table = table.transpose(0, 1) if of_heads else table.unsqueeze(1)
    prefix, patches = x_BHNC.tensor_split([tokens.prefix], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, table, half=half)], dim=2)
