"""Data sets and transforms: one file per family of data sets."""

from tokendial.data.dense import DenseAugment
from tokendial.data.fgvc import FGVC
from tokendial.data.folder import ImageFolder
from tokendial.data.images import ImageError, find_images, read_image
from tokendial.data.pairs import Pairs
from tokendial.data.scenes import SceneMasks, Scenes
from tokendial.data.splits import Splits
from tokendial.data.transforms import Augment, eval_transform, train_transform
from tokendial.data.unlabelled import Unlabelled
from tokendial.data.vtab import VTAB, VTAB_GROUPS, VTAB_TASKS

__all__ = [
    "FGVC",
    "VTAB",
    "VTAB_GROUPS",
    "VTAB_TASKS",
    "Augment",
    "DenseAugment",
    "ImageError",
    "ImageFolder",
    "Pairs",
    "SceneMasks",
    "Scenes",
    "Splits",
    "Unlabelled",
    "eval_transform",
    "find_images",
    "read_image",
    "train_transform",
]
