"""AdaptFormer: a bottleneck beside each FFN.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, https://arxiv.org/abs/2205.13535, section 3.2: the branch reads the un-normalised
tokens that enter the FFN, without a LayerNorm of its own.

With several experts it is the adapter of DyT's variant: Zhao et al., "Dynamic Tuning Towards
Parameter and Inference Efficiency for ViT Adaptation", NeurIPS 2024,
https://arxiv.org/abs/2403.11808, section on the MoE adapter. A router mixes the experts' weights
into one adapter for each image, so they cost little more than one. The authors' code does not hold
it; that the router reads the mean of the tokens is our reading.
"""

# Shape legend: B batch, N tokens, D embed_dim, E experts, I and O inputs and outputs of a layer.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, Bottlenecks
from tokendial.checks import check_bottleneck
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "adaptformer")
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(AdapterConfig):
    """Add `scale * up(ReLU(down(x)))` to the FFN of each layer."""

    dim: int = 64
    """Width of the bottleneck."""
    scale: float = 0.1
    """Factor on the branch."""
    experts: int = 1
    """Adapters in each layer, mixed by a router."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)
        if type(self.experts) is not int or self.experts < 1:
            raise ValueError(f"experts must be an integer of at least 1, got {self.experts}.")

    def build(self, vit: ViTShape) -> "AdaptFormerAdapter | MixedAdaptFormer":
        """Make the module."""
        if self.experts > 1:
            return MixedAdaptFormer(vit, self)
        return AdaptFormerAdapter(vit, self.dim, self.scale)


class AdaptFormerAdapter(Bottlenecks):
    """Runs AdaptFormer."""

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The branch of this layer."""
        return self.bottleneck(layer, tokens.x), tokens.carried


class MixedAdaptFormer(Adapter):
    """Runs AdaptFormer with experts: `experts` bottlenecks and a router per layer."""

    needs_all = True

    def __init__(self, vit: ViTShape, config: AdaptFormer) -> None:
        super().__init__()
        self.scale = config.scale
        self.experts = nn.ModuleList(
            Bottlenecks(vit, config.dim, config.scale) for _ in range(config.experts)
        )
        self.routers = nn.ModuleList(
            nn.Linear(vit.embed_dim, config.experts) for _ in range(vit.depth)
        )

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The branch of this layer, with weights mixed for each image."""
        share_BE = self.routers[layer - 1](tokens.x.mean(dim=1)).softmax(dim=-1)

        def linear(side: str, x_BND: Tensor) -> Tensor:
            layers: list[Any] = [getattr(expert, side)[layer - 1] for expert in self.experts]
            weight_EOI = torch.stack([linear.weight for linear in layers])
            bias_EO = torch.stack([linear.bias for linear in layers])
            # As one product of matrices, which autocast knows.
            mixed_BOI = (share_BE @ weight_EOI.flatten(1)).unflatten(1, weight_EOI.shape[1:])
            out: Tensor = x_BND @ mixed_BOI.transpose(1, 2) + (share_BE @ bias_EO).unsqueeze(1)
            return out

        return self.scale * linear("up", linear("down", tokens.x).relu()), tokens.carried
