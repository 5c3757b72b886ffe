"""The packed weights of queries, keys and values in `nn.MultiheadAttention`, as a linear layer."""

# Shape legend: B batch, N tokens, D embed_dim.

import torch.nn.functional as F
from torch import Tensor, nn


class InProjection(nn.Module):
    """The input projection of an `nn.MultiheadAttention`, whose weights stay in that layer.

    `nn.MultiheadAttention` holds one parameter for queries, keys and values instead of a linear
    layer. This module calls it like a linear layer, so that a compensator can change its weights
    or hook its output.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        # Not a submodule: the parameters would appear twice.
        object.__setattr__(self, "attention", attention)
        self.attention: nn.MultiheadAttention

    @property
    def weight(self) -> Tensor:
        """[3 * D, D], the rows of queries, keys and values in this order."""
        return self.attention.in_proj_weight

    def forward(self, x_BND: Tensor) -> Tensor:
        """Queries, keys and values of all heads, [B, N, 3 * D]."""
        return F.linear(x_BND, self.attention.in_proj_weight, self.attention.in_proj_bias)
