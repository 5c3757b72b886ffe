"""Tasks, such as classification: each has its transforms, loss, inference and metrics."""

from tokendial.tasks.base import Task, collate
from tokendial.tasks.binary_masks import BinaryMasks, FeatureDistillation
from tokendial.tasks.classification import Classification
from tokendial.tasks.embeddings import Embeddings
from tokendial.tasks.segmentation import Segmentation
from tokendial.tasks.video import VideoClassification

__all__ = [
    "BinaryMasks",
    "Classification",
    "Embeddings",
    "FeatureDistillation",
    "Segmentation",
    "Task",
    "VideoClassification",
    "collate",
]
