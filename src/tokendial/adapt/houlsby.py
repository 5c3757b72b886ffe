"""Adapter: a bottleneck after each FFN.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019,
https://arxiv.org/abs/1902.00751, in the form that vision papers compare with (Pfeiffer et al.,
https://arxiv.org/abs/2005.00247): one bottleneck per layer, after the FFN, none after attention.
"""

from dataclasses import dataclass

from torch import Tensor

from tokendial.adapt.base import AdapterConfig, Bottlenecks
from tokendial.checks import check_bottleneck
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("adapt", "houlsby")
@dataclass(frozen=True, kw_only=True)
class Houlsby(AdapterConfig):
    """Turn the output h of each FFN into `h + scale * up(ReLU(down(h)))`."""

    dim: int = 64
    """Width of the bottleneck."""
    scale: float = 1.0
    """Factor on the bottleneck."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)

    def build(self, vit: ViTShape) -> "HoulsbyAdapter":
        """Make the module."""
        return HoulsbyAdapter(vit, self.dim, self.scale)


class HoulsbyAdapter(Bottlenecks):
    """Runs the adapters of all layers."""

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """The FFN's output and the bottleneck's."""
        return out + self.bottleneck(layer, out)
