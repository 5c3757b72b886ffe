"""AdaptFormer: a bottleneck beside each FFN.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, https://arxiv.org/abs/2205.13535, section 3.2: the branch reads the un-normalised
tokens that enter the FFN, without a LayerNorm of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, check_bottleneck, init_bottleneck
from tokendial.methods import register
from tokendial.reduce.base import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "adaptformer")
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(AdapterConfig):
    """Add `scale * up(ReLU(down(x)))` to the FFN of each layer."""

    dim: int = 64
    """Width of the bottleneck."""
    scale: float = 0.1
    """Factor on the branch."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)

    def build(self, vit: ViTShape) -> "AdaptFormerAdapter":
        """Make the module."""
        return AdaptFormerAdapter(self, vit)


class AdaptFormerAdapter(Adapter):
    """Runs AdaptFormer: 2 * D * dim + dim + D parameters per layer."""

    def __init__(self, config: AdaptFormer, vit: ViTShape) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.ModuleList(nn.Linear(vit.embed_dim, config.dim) for _ in range(vit.depth))
        self.up = nn.ModuleList(nn.Linear(config.dim, vit.embed_dim) for _ in range(vit.depth))
        for down, up in zip(self.down, self.up, strict=True):
            init_bottleneck(down, up)  # type: ignore[arg-type]  # ModuleList forgets its type

    def beside_ffn(
        self, layer: int, tokens: Tokens, normed: Callable[[], Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The branch of this layer."""
        hidden = F.relu(self.down[layer - 1](tokens.x))
        return self.scale * self.up[layer - 1](hidden), tokens.carried
