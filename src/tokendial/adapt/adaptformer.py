"""AdaptFormer: a bottleneck beside each FFN.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, https://arxiv.org/abs/2205.13535, section 3.2: the branch reads the un-normalised
tokens that enter the FFN. Dropout, a LayerNorm and a learnt scale are options of the authors' code,
which trains with a dropout of 0.1.

With `experts` above 1 it is the MoE adapter of DyT: Zhao et al., "Dynamic Tuning Towards Parameter
and Inference Efficiency for ViT Adaptation", NeurIPS 2024, https://arxiv.org/abs/2403.11808. For
each image, a router mixes the experts' weights into one adapter, so that several experts cost
little more than one. The authors' code does not contain it. That the router reads the mean of the
tokens is our reading of the paper.
"""

# Shape legend: B batch, N tokens, D embed_dim, E experts, I and O inputs and outputs of a layer.

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, Bottlenecks
from tokendial.checks import check_bottleneck, check_choice, check_count, check_dropout
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "adaptformer")
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(AdapterConfig):
    """AdaptFormer: add `scale * up(ReLU(down(x)))` to the output of each FFN."""

    dim: int = 64
    """Width of the bottleneck between `down` and `up`."""
    scale: float | Literal["learnt"] = 0.1
    """Factor on the output of the bottleneck, above 0; "learnt" is one factor per layer that learns
    and starts at 1."""
    experts: int = 1
    """Number of bottlenecks in each layer, whose weights a router mixes for each image."""
    dropout: float = 0.0
    """Probability of dropout between `down` and `up` in training, in [0, 1)."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """Where the branch has a LayerNorm: nowhere, before `down` ("in"), or on its output ("out")."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, 1.0 if self.scale == "learnt" else self.scale)
        check_count("experts", self.experts)
        check_dropout("dropout", self.dropout)
        check_choice("layer_norm", self.layer_norm, ("none", "in", "out"))
        if self.experts > 1 and (self.scale == "learnt" or self.layer_norm != "none"):
            raise ValueError(
                "experts above 1 need a number as scale and layer_norm none, got "
                f"experts={self.experts}, scale={self.scale!r}, layer_norm={self.layer_norm!r}."
            )

    def build(self, vit: ViTShape) -> "AdaptFormerAdapter | MixedAdaptFormer":
        """Make the bottlenecks, and with several experts the routers."""
        if self.experts > 1:
            return MixedAdaptFormer(vit, self)
        return AdaptFormerAdapter(vit, self)


class AdaptFormerAdapter(Bottlenecks):
    """Runs AdaptFormer with one bottleneck per layer."""

    def __init__(self, vit: ViTShape, config: AdaptFormer) -> None:
        scale = 1.0 if isinstance(config.scale, str) else config.scale
        super().__init__(vit, config.dim, scale, dropout=config.dropout)
        self.layer_norm = config.layer_norm
        self.norms = nn.ModuleList(
            nn.LayerNorm(vit.embed_dim) for _ in range(vit.depth) if config.layer_norm != "none"
        )
        self.scales = nn.ParameterList(
            torch.ones(1) for _ in range(vit.depth) if config.scale == "learnt"
        )

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the output of this layer's bottleneck."""
        x = self.norms[layer - 1](tokens.x) if self.layer_norm == "in" else tokens.x
        out = self.bottleneck(layer, x)
        if len(self.scales):
            out = self.scales[layer - 1] * out
        return self.norms[layer - 1](out) if self.layer_norm == "out" else out, tokens.carried


class MixedAdaptFormer(Adapter):
    """Runs AdaptFormer with `experts` bottlenecks and one router per layer."""

    depends_on_other_tokens = True

    def __init__(self, vit: ViTShape, config: AdaptFormer) -> None:
        super().__init__()
        self.scale: Any = config.scale  # a number: it is not learnt here
        self.dropout = config.dropout
        self.experts = nn.ModuleList(Bottlenecks(vit, config.dim) for _ in range(config.experts))
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

        hidden = F.dropout(linear("down", tokens.x).relu(), self.dropout, self.training)
        return self.scale * linear("up", hidden), tokens.carried
