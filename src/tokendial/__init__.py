"""Tokendial: one fine-tuned Vision Transformer, run at any cost."""

from tokendial.adapt import AdaptFormer, DARAdapter, DenseAdapter, Full, Linear, LoRA
from tokendial.backbones import Backbone
from tokendial.reduce import DAR, DynamicViT, DyT, EViT, FFNMerge, ToMe
from tokendial.reference import load_reference
from tokendial.saving import load
from tokendial.vit import DialViT, wrap

__all__ = [
    "DAR",
    "AdaptFormer",
    "Backbone",
    "DARAdapter",
    "DenseAdapter",
    "DialViT",
    "DyT",
    "DynamicViT",
    "EViT",
    "FFNMerge",
    "Full",
    "Linear",
    "LoRA",
    "ToMe",
    "load",
    "load_reference",
    "wrap",
]
__version__ = "0.1.0"
