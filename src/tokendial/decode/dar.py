"""DAR's decoder: two normalised 1x1 convolutions, one on each side of an enlargement.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: no bias before a BatchNorm; whole channels are dropped.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from tokendial.decode.base import DecoderConfig, check_counts, check_dropout
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("decode", "dar")
@dataclass(frozen=True, kw_only=True)
class DARDecoder(DecoderConfig):
    """Logits at `enlarge` times the resolution of the patches."""

    num_classes: int = 1
    """Logit maps: one for a binary mask."""
    channels: int = 256
    """Width between the convolutions."""
    enlarge: int = 4
    """Factor of the bilinear enlargement."""
    dropout: float = 0.1
    """Share of the channels that are dropped before the last convolution, in training."""

    def __post_init__(self) -> None:
        check_counts(num_classes=self.num_classes, channels=self.channels, enlarge=self.enlarge)
        check_dropout(self.dropout)

    def build(self, vit: ViTShape) -> nn.Module:
        """Make the module."""
        width = self.channels
        return nn.Sequential(
            OrderedDict(
                reduce=_normalised(vit.embed_dim, width),
                enlarge=nn.Upsample(scale_factor=self.enlarge, mode="bilinear"),
                fuse=_normalised(width, width),
                dropout=nn.Dropout2d(self.dropout),
                predict=nn.Conv2d(width, self.num_classes, 1),
            )
        )


def _normalised(inside: int, outside: int) -> nn.Module:
    conv = nn.Conv2d(inside, outside, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outside), act=nn.ReLU()))
