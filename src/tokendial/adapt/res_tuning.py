"""ResTuning: a light network beside the frozen backbone, which reads the output of each block.

Source: Jiang et al., "Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from
Backbone", NeurIPS 2023, https://arxiv.org/abs/2310.19859, section 3.3 (Res-Tuning-Bypass), and the
authors' code: both tuners of a layer have a residual connection, GELU, and Xavier's weights. The
bypass begins with the embedded tokens. What it ends with takes the place of what the last block
returns.

No gradient passes through the backbone, so its activations are not kept in training.

Departure: where a reduction drops or merges tokens, their features in the bypass follow them.
"""

# Shape legend: B batch, N tokens, D embed_dim.

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig, ResidualBottleneck
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

_CARRIED = "bypass"


@register("adapt", "res_tuning")
@dataclass(frozen=True, kw_only=True)
class ResTuning(AdapterConfig):
    """ResTuning: bottlenecks beside the backbone; training keeps none of its activations."""

    dim: int = 16
    """Width of the two bottlenecks of each layer, at least 1."""

    def __post_init__(self) -> None:
        check_count("dim", self.dim)

    def build(self, vit: ViTShape) -> "ResTuningBypass":
        """Make two bottlenecks for each block."""
        return ResTuningBypass(self, vit)


class ResTuningBypass(Adapter):
    """Runs ResTuning. `Tokens.carried` holds the bypass.

    A new one does not leave the outputs unchanged: the bypass sums up the outputs of all blocks.
    """

    def __init__(self, config: ResTuning, vit: ViTShape) -> None:
        super().__init__()
        self.depth = vit.depth
        self.lateral, self.vertical = (
            nn.ModuleList(_tuner(vit.embed_dim, config.dim) for _ in range(vit.depth))
            for _ in range(2)
        )

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Begin the bypass with the embedded tokens."""
        if layer > 1:
            return tokens
        return replace(tokens, carried=tokens.carried | {_CARRIED: tokens.x})

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Add what the block's output and the bypass become; after the last block, return that."""
        carried: dict[str, Any] = dict(tokens.carried)
        bypass = self.vertical[layer - 1](carried.pop(_CARRIED))
        bypass = bypass + self.lateral[layer - 1](tokens.x)
        if layer == self.depth:
            return replace(tokens, x=bypass, carried=carried)
        return replace(tokens, carried=carried | {_CARRIED: bypass})


def _tuner(embed_dim: int, dim: int) -> ResidualBottleneck:
    """A tuner with the first weights of the authors' code."""
    tuner = ResidualBottleneck(embed_dim, dim)
    for linear in (tuner.down, tuner.up):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)
    return tuner
