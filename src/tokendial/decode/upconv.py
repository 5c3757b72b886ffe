"""A decoder of transposed convolutions, each of which doubles the resolution.

Source: the usual upsampling head of dense prediction, as in DCGAN's generator (Radford et al.,
"Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks", ICLR
2016, https://arxiv.org/abs/1511.06434): kernel 4, stride 2, padding 1, then BatchNorm and ReLU.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from tokendial.checks import check_count
from tokendial.decode.base import DecoderConfig
from tokendial.methods import register
from tokendial.shape import ViTShape

KERNEL, STRIDE, PADDING = 4, 2, 1
"""Settings of each transposed convolution: its output has exactly twice the rows and columns."""


@register("decode", "upconv")
@dataclass(frozen=True, kw_only=True)
class UpConvDecoder(DecoderConfig):
    """Transposed convolutions: three of them give logits at 8 times the patch grid's resolution."""

    num_classes: int = 1
    """Number of logit maps: the number of classes, or 1 for a binary mask."""
    channels: tuple[int, ...] = (256, 128, 64)
    """Number of output channels of each transposed convolution. Each doubles the resolution."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        check_count("num_classes", self.num_classes)
        if not self.channels:
            raise ValueError("channels must hold at least one number of channels, got ().")
        for number in self.channels:
            check_count("channels", number)

    def build(self, vit: ViTShape) -> nn.Module:
        """Make the layers."""
        widths = (vit.embed_dim, *self.channels)
        stages = nn.Sequential(*(_up_norm_act(*pair) for pair in pairwise(widths)))
        predict = nn.Conv2d(self.channels[-1], self.num_classes, 1)
        return nn.Sequential(OrderedDict(stages=stages, predict=predict))


def _up_norm_act(inputs: int, outputs: int) -> nn.Module:
    up = nn.ConvTranspose2d(inputs, outputs, KERNEL, STRIDE, PADDING)
    # An output pixel reads 2 x 2 weights of each input channel; torch's own count is another one.
    nn.init.normal_(up.weight, std=(2 / (inputs * (KERNEL // STRIDE) ** 2)) ** 0.5)
    nn.init.zeros_(up.bias)  # type: ignore[arg-type]  # it has one
    return nn.Sequential(OrderedDict(up=up, norm=nn.BatchNorm2d(outputs), act=nn.ReLU()))
