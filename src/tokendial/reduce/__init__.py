"""Token-reduction methods, one file per method, and the interface that they share."""

from tokendial.passes import ForwardPass, TrainingPasses
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.dar import DAR
from tokendial.reduce.dynamicvit import DynamicViT
from tokendial.reduce.dyt import DyT
from tokendial.reduce.evit import EViT
from tokendial.reduce.ffn_merge import FFNMerge
from tokendial.reduce.frame_by_frame import FrameByFrame
from tokendial.reduce.in_windows import InWindows
from tokendial.reduce.learnt_metric import LearntMetric
from tokendial.reduce.pitome import PiToMe
from tokendial.reduce.presets import preset
from tokendial.reduce.prune_merge import PruneMerge
from tokendial.reduce.pyra import PYRA
from tokendial.reduce.stack import Stack
from tokendial.reduce.tome import ToMe
from tokendial.shape import ViTShape

__all__ = [
    "DAR",
    "PYRA",
    "DyT",
    "DynamicViT",
    "EViT",
    "FFNMerge",
    "ForwardPass",
    "FrameByFrame",
    "InWindows",
    "LearntMetric",
    "PiToMe",
    "PruneMerge",
    "Reducer",
    "ReducerConfig",
    "Stack",
    "ToMe",
    "TrainingPasses",
    "ViTShape",
    "preset",
]
