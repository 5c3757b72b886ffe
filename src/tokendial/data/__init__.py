"""Data sets, readers of files and transforms."""

from tokendial.data.readers.images import ImageError, find_images, read_image
from tokendial.data.readers.video import FrameFolder, Video, VideoError, VideoFile, find_videos
from tokendial.data.sets.actions import K400, SSv2
from tokendial.data.sets.cifar import CIFAR100
from tokendial.data.sets.elpv import ELPV
from tokendial.data.sets.fgvc import FGVC
from tokendial.data.sets.folder import ImageFolder
from tokendial.data.sets.food import Food101
from tokendial.data.sets.hub import HuggingFace
from tokendial.data.sets.imagenet import ImageNet
from tokendial.data.sets.pairs import Pairs
from tokendial.data.sets.scenes import SceneMasks, Scenes
from tokendial.data.sets.shards import ShardImage, WebDataset, find_sources
from tokendial.data.sets.stamps import Stamps
from tokendial.data.sets.svhn import SVHN
from tokendial.data.sets.unlabelled import Unlabelled
from tokendial.data.sets.videos import VideoFolder, VideoLists
from tokendial.data.sets.vtab import VTAB, VTAB_GROUPS, VTAB_TASKS
from tokendial.data.splits import Splits
from tokendial.data.transforms.clip import Clip
from tokendial.data.transforms.image import Augment, eval_transform, train_transform
from tokendial.data.transforms.masks import MaskAugment

__all__ = [
    "CIFAR100",
    "ELPV",
    "FGVC",
    "K400",
    "SVHN",
    "VTAB",
    "VTAB_GROUPS",
    "VTAB_TASKS",
    "Augment",
    "Clip",
    "Food101",
    "FrameFolder",
    "HuggingFace",
    "ImageError",
    "ImageFolder",
    "ImageNet",
    "MaskAugment",
    "Pairs",
    "SSv2",
    "SceneMasks",
    "Scenes",
    "ShardImage",
    "Splits",
    "Stamps",
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
