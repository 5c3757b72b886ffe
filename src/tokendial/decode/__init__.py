"""Decoders: they turn the feature map of a model into one logit map per class."""

from tokendial.decode.base import DecoderConfig
from tokendial.decode.dar import DARDecoder
from tokendial.decode.linear import LinearDecoder
from tokendial.decode.segmenter import MaskTransformer
from tokendial.decode.upconv import UpConvDecoder

__all__ = ["DARDecoder", "DecoderConfig", "LinearDecoder", "MaskTransformer", "UpConvDecoder"]
