"""Linear decoder: one linear classifier for all patches.

Source: the linear baseline of Strudel et al., "Segmenter: Transformer for Semantic Segmentation",
ICCV 2021, https://arxiv.org/abs/2105.05633.
"""

from dataclasses import dataclass

from torch import nn

from tokendial.checks import check_count
from tokendial.decode.base import DecoderConfig
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("decode", "linear")
@dataclass(frozen=True, kw_only=True)
class LinearDecoder(DecoderConfig):
    """Linear decoder: one linear layer, with logits at the resolution of the patch grid."""

    num_classes: int = 1
    """Number of logit maps: the number of classes, or 1 for a binary mask."""

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)

    def build(self, vit: ViTShape) -> nn.Module:
        """Make the linear layer."""
        linear = nn.Conv2d(vit.embed_dim, self.num_classes, 1)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]  # it has one
        return linear
