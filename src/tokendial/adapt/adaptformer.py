"""AdaptFormer: a bottleneck beside each FFN.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, https://arxiv.org/abs/2205.13535, section 3.2: the branch reads the un-normalised
tokens that enter the FFN, without a LayerNorm of its own. Departure: no dropout in the branch (the
authors' code: 0.1).

With `experts` above 1 it is the MoE adapter of DyT: Zhao et al., "Dynamic Tuning Towards Parameter
and Inference Efficiency for ViT Adaptation", NeurIPS 2024, https://arxiv.org/abs/2403.11808. For
each image, a router mixes the experts' weights into one adapter, so that several experts cost
little more than one. The authors' code does not contain it. That the router reads the mean of the
tokens is our reading of the paper.
"""

# Shape legend: B batch, N tokens, D embed_dim, E experts, I and O inputs and outputs of a layer.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, Bottlenecks
from tokendial.checks import check_bottleneck, check_count
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "adaptformer")
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(AdapterConfig):
    """AdaptFormer: add `scale * up(ReLU(down(x)))` to the output of each FFN."""

    dim: int = 64
    """Width of the bottleneck between `down` and `up`."""
    scale: float = 0.1
    """Factor on the output of the bottleneck, above 0."""
    experts: int = 1
    """Number of bottlenecks in each layer, whose weights a router mixes for each image."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)
        check_count("experts", self.experts)

    def build(self, vit: ViTShape) -> "AdaptFormerAdapter | MixedAdaptFormer":
        """Make the bottlenecks, and with several experts the routers."""
        if self.experts > 1:
            return MixedAdaptFormer(vit, self)
        return AdaptFormerAdapter(vit, self.dim, self.scale)


class AdaptFormerAdapter(Bottlenecks):
    """Runs AdaptFormer with one bottleneck per layer."""

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the output of this layer's bottleneck."""
        return self.bottleneck(layer, tokens.x), tokens.carried


class MixedAdaptFormer(Adapter):
    """Runs AdaptFormer with `experts` bottlenecks and one router per layer."""

    depends_on_other_tokens = True

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
        """Return the output of this layer's bottleneck, whose weights are mixed for each image."""
        share_BE = self.routers[layer - 1](tokens.x.mean(dim=1)).softmax(dim=-1)

        def linear(side: str, x_BND: Tensor) -> Tensor:
            layers: list[Any] = [getattr(expert, side)[layer - 1] for expert in self.experts]
            weight_EOI = torch.stack([linear.weight for linear in layers])
            bias_EO = torch.stack([linear.bias for linear in layers])
            # The weights are mixed by a matrix product, an operator that autocast casts.
            mixed_BOI = (share_BE @ weight_EOI.flatten(1)).unflatten(1, weight_EOI.shape[1:])
            out: Tensor = x_BND @ mixed_BOI.transpose(1, 2) + (share_BE @ bias_EO).unsqueeze(1)
            return out

        return self.scale * linear("up", linear("down", tokens.x).relu()), tokens.carried
