"""What every data set gives: a training set, a validation set and the classes."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True, slots=True)
class Splits:
    """A data set, ready to be transformed and batched."""

    train: Dataset[tuple[Any, Any]]
    """Pairs of a PIL image (RGB) or a video and a target: a class index, float32 [classes] of 0 and
    1, or, for dense tasks, a mask of the image's size."""
    val: Dataset[tuple[Any, Any]]
    """The same, to evaluate on."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the model's logits; for binary masks a single one."""
    multi_label: bool = False
    """Whether any number of classes can be right at once."""
    dense: bool = False
    """Whether targets are masks: [H, W] uint8, of class indices, or with a single class of 0 and 1,
    and 255 where nothing is asked."""
    video: bool = False
    """Whether these are videos: a `Video` in place of each image."""
