"""Token reduction: one file per method."""

from tokendial.reduce.base import Outcome, Passes, Reducer, ReducerConfig, ViTShape
from tokendial.reduce.dar import DAR
from tokendial.reduce.dynamicvit import DynamicViT
from tokendial.reduce.dyt import DyT
from tokendial.reduce.evit import EViT
from tokendial.reduce.ffn_merge import FFNMerge
from tokendial.reduce.frame_by_frame import FrameByFrame
from tokendial.reduce.tome import ToMe

__all__ = [
    "DAR",
    "DyT",
    "DynamicViT",
    "EViT",
    "FFNMerge",
    "FrameByFrame",
    "Outcome",
    "Passes",
    "Reducer",
    "ReducerConfig",
    "ToMe",
    "ViTShape",
]
