"""AdaptFormer: a bottleneck beside each FFN.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, https://arxiv.org/abs/2205.13535, section 3.2: the branch reads the un-normalised
tokens that enter the FFN, without a LayerNorm of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokendial.adapt.base import AdapterConfig, Bottlenecks, check_bottleneck
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
        return AdaptFormerAdapter(vit, self.dim, self.scale)


class AdaptFormerAdapter(Bottlenecks):
    """Runs AdaptFormer."""

    def beside_ffn(
        self, layer: int, tokens: Tokens, normed: Callable[[], Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The branch of this layer."""
        return self.bottleneck(layer, tokens.x), tokens.carried
