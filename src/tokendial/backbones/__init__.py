"""Backbones: the kinds of ViT that run block by block, and how to build and load them."""

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.build import (
    SHIPPED_NAME,
    Backbone,
    fingerprint,
    same_backbone,
)
from tokendial.backbones.convert import ConvertedWeights, convert_weights
from tokendial.backbones.kinds import anatomy_of
from tokendial.backbones.loading import load_weights
from tokendial.backbones.pooling import new_head, video_vit

__all__ = [
    "SHIPPED_NAME",
    "Anatomy",
    "Backbone",
    "ConvertedWeights",
    "anatomy_of",
    "convert_weights",
    "fingerprint",
    "load_weights",
    "new_head",
    "same_backbone",
    "video_vit",
]
