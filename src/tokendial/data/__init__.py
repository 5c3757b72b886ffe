"""Data sets and transforms: one file per family of data sets."""

from tokendial.data.actions import K400, SSv2
from tokendial.data.cifar import CIFAR100
from tokendial.data.clip import Clip
from tokendial.data.dense import DenseAugment
from tokendial.data.fgvc import FGVC
from tokendial.data.folder import ImageFolder
from tokendial.data.food import Food101
from tokendial.data.hub import HuggingFace
from tokendial.data.imagenet import ImageNet
from tokendial.data.images import ImageError, find_images, read_image
from tokendial.data.pairs import Pairs
from tokendial.data.scenes import SceneMasks, Scenes
from tokendial.data.shards import ShardImage, WebDataset, find_sources
from tokendial.data.splits import Splits
from tokendial.data.svhn import SVHN
from tokendial.data.transforms import Augment, eval_transform, train_transform
from tokendial.data.unlabelled import Unlabelled
from tokendial.data.video import FrameFolder, Video, VideoError, VideoFile, find_videos
from tokendial.data.video_sets import VideoFolder, VideoLists
from tokendial.data.vtab import VTAB, VTAB_GROUPS, VTAB_TASKS

__all__ = [
    "CIFAR100",
    "FGVC",
    "K400",
    "SVHN",
    "VTAB",
    "VTAB_GROUPS",
    "VTAB_TASKS",
    "Augment",
    "Clip",
    "DenseAugment",
    "Food101",
    "FrameFolder",
    "HuggingFace",
    "ImageError",
    "ImageFolder",
    "ImageNet",
    "Pairs",
    "SSv2",
    "SceneMasks",
    "Scenes",
    "ShardImage",
    "Splits",
    "Unlabelled",
    "Video",
    "VideoError",
    "VideoFile",
    "VideoFolder",
    "VideoLists",
    "WebDataset",
    "eval_transform",
    "find_images",
    "find_sources",
    "find_videos",
    "read_image",
    "train_transform",
]
