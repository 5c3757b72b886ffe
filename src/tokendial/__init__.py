"""Tokendial: one fine-tuned Vision Transformer, run at any cost."""

from tokendial.adapt import (
    PEFT,
    SSF,
    VPT,
    AdaptFormer,
    BitFit,
    ConvPass,
    DARAdapter,
    DenseAdapter,
    FacT,
    Full,
    Houlsby,
    LastBlocks,
    Linear,
    LoRA,
)
from tokendial.backbones import Backbone, convert_weights, video_vit
from tokendial.compensate import Compensator, ToCom
from tokendial.decode import DARDecoder, LinearDecoder, MaskTransformer
from tokendial.measure import calibrate
from tokendial.reduce import DAR, DynamicViT, DyT, EViT, FFNMerge, FrameByFrame, ToMe
from tokendial.reference import load_reference
from tokendial.saving import load
from tokendial.schedules import Fitted, fit
from tokendial.speed import Optimized, optimize
from tokendial.vit import DialViT, wrap

__all__ = [
    "DAR",
    "PEFT",
    "SSF",
    "VPT",
    "AdaptFormer",
    "Backbone",
    "BitFit",
    "Compensator",
    "ConvPass",
    "DARAdapter",
    "DARDecoder",
    "DenseAdapter",
    "DialViT",
    "DyT",
    "DynamicViT",
    "EViT",
    "FFNMerge",
    "FacT",
    "Fitted",
    "FrameByFrame",
    "Full",
    "Houlsby",
    "LastBlocks",
    "Linear",
    "LinearDecoder",
    "LoRA",
    "MaskTransformer",
    "Optimized",
    "ToCom",
    "ToMe",
    "calibrate",
    "convert_weights",
    "fit",
    "load",
    "load_reference",
    "optimize",
    "video_vit",
    "wrap",
]
__version__ = "0.1.0"
