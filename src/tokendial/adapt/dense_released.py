"""ReleasedDenseAdapter: the adapter in the code that Sparse-Tuning's authors released.

Source: the authors' code, https://github.com/liuting20/Sparse-Tuning. It is an earlier form than
the Dense Adapter of the published paper (`DenseAdapter`); files that were made with it need it.

Each block has a bottleneck with an inner, narrower one. The blocks form four groups. After a
group's last block, the outputs of its adapters are added to the tokens once more; in the first
group the embedded tokens too. In the last group the output of the last block is left out of that
sum.
"""

# Shape legend: B batch, N tokens, D embed_dim.

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, init_bottleneck
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

_GROUPS = 4
_CARRIED = "group"


@register("adapt", "released_dense_adapter")
@dataclass(frozen=True, kw_only=True)
class ReleasedDenseAdapter(AdapterConfig):
    """The adapter of Sparse-Tuning's released code, for files that were made with it."""

    dims: tuple[int, int] = (64, 32)
    """Widths of the bottleneck and of the inner one."""

    def __post_init__(self) -> None:
        dims: object = self.dims
        if not isinstance(dims, list | tuple) or len(dims) != 2:
            raise ValueError(f"dims must be two widths, got {dims!r}.")
        for dim in dims:
            check_count("dims", dim)
        object.__setattr__(self, "dims", tuple(dims))

    def build(self, vit: ViTShape) -> "ReleasedDenseAdapters":
        """Make one adapter per layer. Raises a ValueError unless there are four equal groups."""
        if vit.depth % _GROUPS:
            raise ValueError(
                f"released_dense_adapter needs a number of blocks that {_GROUPS} divides, got "
                f"{vit.depth}."
            )
        return ReleasedDenseAdapters(self, vit)


class DoubleBottleneck(nn.Module):
    """A bottleneck with an inner one: D to dims[0] to dims[1], and back."""

    def __init__(self, embed_dim: int, dims: Sequence[int]) -> None:
        super().__init__()
        outer, inner = dims
        self.down1, self.down2 = nn.Linear(embed_dim, outer), nn.Linear(outer, inner)
        self.up1, self.down3 = nn.Linear(inner, outer), nn.Linear(inner + outer, outer)
        self.up2 = nn.Linear(outer, embed_dim)
        init_bottleneck(self.down1, self.up2)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map tokens [B, N, D] to [B, N, D]."""
        hidden = self.down1(x_BND).relu()
        inner = self.down2(hidden)
        both = torch.cat([inner, self.up1(inner)], dim=-1)
        out: Tensor = self.up2(self.down3(both) + hidden)
        return out


class ReleasedDenseAdapters(Adapter):
    """Runs the released adapters. `Tokens.carried` holds the sum of the present group.

    A new one changes the outputs: the embedded tokens are added after the first group.
    """

    def __init__(self, config: ReleasedDenseAdapter, vit: ViTShape) -> None:
        super().__init__()
        self.depth, self.group_size = vit.depth, vit.depth // _GROUPS
        self.layers = nn.ModuleList(
            DoubleBottleneck(vit.embed_dim, config.dims) for _ in range(vit.depth)
        )

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Begin the first group's sum with the embedded tokens."""
        if layer > 1:
            return tokens
        return replace(tokens, carried=tokens.carried | {_CARRIED: tokens.x})

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return this layer's output, and add it to the sum of its group."""
        out: Tensor = self.layers[layer - 1](tokens.x)
        if layer == self.depth:
            return out, tokens.carried
        before = tokens.carried.get(_CARRIED)
        return out, tokens.carried | {_CARRIED: out if before is None else before + out}

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Add the sum of a group to the tokens that leave its last block."""
        if layer % self.group_size or _CARRIED not in tokens.carried:
            return tokens  # a last group of one block has no sum
        carried = dict(tokens.carried)
        return replace(tokens, x=tokens.x + carried.pop(_CARRIED), carried=carried)
