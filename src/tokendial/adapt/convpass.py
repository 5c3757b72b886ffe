"""ConvPass: convolutional bypasses beside attention and FFN.

Source: Jie and Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", 2022,
https://arxiv.org/abs/2207.07039, section 3.2: both bypasses read the normalised tokens; each prefix
token passes the convolution as an image of one pixel. The authors' code trains with a dropout of
0.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.checks import check_bottleneck, check_dropout
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens, from_grid, to_grid


@register("adapt", "convpass")
@dataclass(frozen=True, kw_only=True)
class ConvPass(AdapterConfig):
    """ConvPass: add `scale * up(GELU(conv3x3(GELU(down(x)))))` to attention and to the FFN."""

    dim: int = 8
    """Number of channels of the convolution in each bypass."""
    scale: float = 1.0
    """Factor on the output of each bypass, above 0."""
    dropout: float = 0.0
    """Probability of dropout before `up` in training, in [0, 1)."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)
        check_dropout("dropout", self.dropout)

    def build(self, vit: ViTShape) -> "Bypasses":
        """Make two bypasses per layer."""
        return Bypasses(self, vit)


class Bypass(nn.Module):
    """One bypass, with 2 * D * dim + 9 * dim ** 2 + 2 * dim + D parameters."""

    def __init__(self, embed_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.down = nn.Linear(embed_dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.up = nn.Linear(dim, embed_dim)
        nn.init.xavier_uniform_(self.down.weight)
        # The convolution starts as the identity, and the bypass returns zeros.
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.conv, self.up):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x_BND: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
        """Map tokens [B, N, D] to [B, N, D].

        Args:
            x_BND: `prefix` tokens, then the patches of one or several grids.
            prefix: Number of prefix tokens.
            grid: Rows and columns of a grid.
        """
        hidden = _quick_gelu(self.down(x_BND))
        first, patches = hidden.tensor_split([prefix], dim=1)
        images, _, width = hidden.shape
        pixels = first.reshape(images * prefix, width, 1, 1)
        first = self.conv(pixels).reshape(images, prefix, width) if prefix else first
        patches = from_grid(self.conv(to_grid(patches, grid)), patches.shape[1])
        hidden = _quick_gelu(torch.cat([first, patches], dim=1))
        out: Tensor = self.up(F.dropout(hidden, self.dropout, self.training))
        return out


class Bypasses(Adapter):
    """Runs ConvPass, with one bypass beside attention and one beside the FFN in each layer."""

    needs_grid = True
    reads_ffn_input = True

    def __init__(self, config: ConvPass, vit: ViTShape) -> None:
        super().__init__()
        self.scale = config.scale
        self.attention, self.ffn = (
            nn.ModuleList(
                Bypass(vit.embed_dim, config.dim, config.dropout) for _ in range(vit.depth)
            )
            for _ in range(2)
        )

    def beside_attention(self, layer: int, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """Return the output of this layer's bypass of attention."""
        out: Tensor = self.attention[layer - 1](x_BND, tokens.prefix, tokens.grid)
        return self.scale * out

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the output of this layer's bypass of the FFN."""
        out = self.ffn[layer - 1](ffn_input, tokens.prefix, tokens.grid)
        return self.scale * out, tokens.carried


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()
