"""Houlsby's adapter: a bottleneck after each FFN.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019,
https://arxiv.org/abs/1902.00751. Departure: one bottleneck per layer, after the FFN, and none after
attention. This is the form that vision papers compare with (Pfeiffer et al.,
https://arxiv.org/abs/2005.00247).
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
    """Houlsby's adapter: replace the output h of each FFN by `h + scale * up(ReLU(down(h)))`."""

    dim: int = 64
    """Width of the bottleneck between `down` and `up`."""
    scale: float = 1.0
    """Factor on the output of the bottleneck, above 0."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)

    def build(self, vit: ViTShape) -> "HoulsbyAdapter":
        """Make one bottleneck per layer."""
        return HoulsbyAdapter(vit, self.dim, self.scale)


class HoulsbyAdapter(Bottlenecks):
    """Runs Houlsby's adapter, with one bottleneck per layer."""

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """Add the output of this layer's bottleneck to that of the FFN."""
        return out + self.bottleneck(layer, out)
