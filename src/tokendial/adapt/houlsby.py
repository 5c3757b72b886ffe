"""Adapter: a bottleneck after each FFN.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019,
https://arxiv.org/abs/1902.00751, in the form that vision papers compare with (Pfeiffer et al.,
https://arxiv.org/abs/2005.00247): one bottleneck per layer, after the FFN, none after attention.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, check_bottleneck, init_bottleneck
from tokendial.methods import register
from tokendial.reduce.base import ViTShape


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
        return HoulsbyAdapter(self, vit)


class HoulsbyAdapter(Adapter):
    """Runs the adapters of all layers: 2 * D * dim + dim + D parameters each."""

    def __init__(self, config: Houlsby, vit: ViTShape) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.ModuleList(nn.Linear(vit.embed_dim, config.dim) for _ in range(vit.depth))
        self.up = nn.ModuleList(nn.Linear(config.dim, vit.embed_dim) for _ in range(vit.depth))
        for down, up in zip(self.down, self.up, strict=True):
            init_bottleneck(down, up)  # type: ignore[arg-type]  # ModuleList forgets its type

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """The FFN's output and the bottleneck's."""
        bottleneck: Tensor = self.up[layer - 1](F.relu(self.down[layer - 1](out)))
        return out + self.scale * bottleneck
