"""Tasks: transforms, loss and metrics."""

from tokendial.tasks.base import Task, collate
from tokendial.tasks.classification import Classification
from tokendial.tasks.clips import VideoClassification
from tokendial.tasks.masks import BinaryMasks, FeatureDistillation
from tokendial.tasks.segmentation import Segmentation

__all__ = [
    "BinaryMasks",
    "Classification",
    "FeatureDistillation",
    "Segmentation",
    "Task",
    "VideoClassification",
    "collate",
]
