"""Token reduction: one file per method."""

from tokendial.reduce.base import Reducer, ReducerConfig, ViTShape
from tokendial.reduce.evit import EViT
from tokendial.reduce.tome import ToMe

__all__ = ["EViT", "Reducer", "ReducerConfig", "ToMe", "ViTShape"]
