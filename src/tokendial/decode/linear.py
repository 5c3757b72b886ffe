"""A linear classifier of every patch."""

from dataclasses import dataclass

from torch import nn

from tokendial.decode.base import DecoderConfig, check_counts
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("decode", "linear")
@dataclass(frozen=True, kw_only=True)
class LinearDecoder(DecoderConfig):
    """One linear layer; logits at the resolution of the patches."""

    num_classes: int = 1
    """Logit maps: one for a binary mask."""

    def __post_init__(self) -> None:
        check_counts(num_classes=self.num_classes)

    def build(self, vit: ViTShape) -> nn.Module:
        """Make the layer."""
        linear = nn.Conv2d(vit.embed_dim, self.num_classes, 1)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]  # it has one
        return linear
