"""Tokendial: one fine-tuned Vision Transformer, run at any cost."""

from tokendial.adapt import AdaptFormer, DenseAdapter, Full, Linear, LoRA
from tokendial.backbones import Backbone
from tokendial.reduce import EViT, ToMe
from tokendial.saving import load
from tokendial.vit import DialViT, wrap

__all__ = [
    "AdaptFormer",
    "Backbone",
    "DenseAdapter",
    "DialViT",
    "EViT",
    "Full",
    "Linear",
    "LoRA",
    "ToMe",
    "load",
    "wrap",
]
__version__ = "0.1.0"
