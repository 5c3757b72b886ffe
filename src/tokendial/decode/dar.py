"""DAR's decoder: a 1x1 convolution, bilinear enlargement, another 1x1 convolution, a classifier.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: the convolutions have no bias, and a BatchNorm and a ReLU
follow each of them; dropout drops whole channels.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from tokendial.checks import check_count, check_dropout
from tokendial.decode.base import DecoderConfig
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("decode", "dar")
@dataclass(frozen=True, kw_only=True)
class DARDecoder(DecoderConfig):
    """DAR's decoder: logits at `enlarge` times the resolution of the patch grid."""

    num_classes: int = 1
    """Number of logit maps: the number of classes, or 1 for a binary mask."""
    channels: int = 256
    """Number of channels of both convolutions."""
    enlarge: int = 4
    """Factor by which bilinear interpolation enlarges the patch grid between the convolutions."""
    dropout: float = 0.1
    """Probability that a channel is dropped before the classifier in training, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels", "enlarge"):
            check_count(name, getattr(self, name))
        check_dropout("dropout", self.dropout)

    def build(self, vit: ViTShape) -> nn.Module:
        """Make the layers."""
        width = self.channels
        return nn.Sequential(
            OrderedDict(
                reduce=_conv_norm_act(vit.embed_dim, width),
                enlarge=nn.Upsample(scale_factor=self.enlarge, mode="bilinear"),
                fuse=_conv_norm_act(width, width),
                dropout=nn.Dropout2d(self.dropout),
                predict=nn.Conv2d(width, self.num_classes, 1),
            )
        )


def _conv_norm_act(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), act=nn.ReLU()))
