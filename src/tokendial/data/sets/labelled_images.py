"""Data sets of images with one label each: images in files or in memory, and broken images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tokendial.checks import check_choice
from tokendial.data.readers.images import read_image
from tokendial.data.readers.integrity import find_broken_images
from tokendial.data.readers.pixels import ValueRange

LabelledFiles = list[tuple[Path, int]]
"""Image (or video) files with the indices of their classes."""
Broken = Literal["error", "skip"]
"""What to do with files that cannot be read: stop, or leave them out."""
_LOG = logging.getLogger(__name__)


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Images in files, each read when it is requested."""

    def __init__(self, files: Sequence[tuple[Path, int]], value_range: ValueRange = None) -> None:
        self.files, self.value_range = list(files), value_range

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return read_image(path, self.value_range), label

    @property
    def labels(self) -> list[int]:
        """Class indices in the order of the images."""
        return [label for _, label in self.files]


class ImageArrays(Dataset[tuple[Image.Image, int]]):
    """Images of one size that are held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Hold `images` [N, H, W, 3] uint8 and their class indices `labels` [N]."""
        self.images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self._labels[index])

    @property
    def labels(self) -> list[int]:
        """Class indices in the order of the images."""
        labels: list[int] = self._labels.tolist()
        return labels


def check_broken(value: str) -> None:
    """Raise a ValueError unless the field `broken` of a data set is "error" or "skip"."""
    check_choice("broken", value, ("error", "skip"))


def drop_broken_images(
    root: Path,
    parts: Sequence[LabelledFiles],
    broken: Broken | None = None,
    value_range: ValueRange = None,
) -> list[LabelledFiles]:
    """Decode every image and return the parts of a data set without those that cannot be read.

    Args:
        root: Folder of the data set.
        parts: Files of each part (such as training and validation) below `root`.
        broken: What to do with broken images; None stops, for data sets that have no such field.
        value_range: Values that become black and white in images of more than 8 bits.

    Raises:
        ValueError: If an image cannot be read and `broken` is not "skip", or if no image of a part
            can be read.
    """
    files = [path for part in parts for path, _ in part]
    problems = find_broken_images(root, files, value_range)
    if not problems:
        return list(parts)
    if broken == "skip" or len(problems) > 1:
        for problem in problems.values():
            _LOG.warning("%s: %s", "left out" if broken == "skip" else "broken", problem)
    first = next(iter(problems.values()))
    if broken != "skip":
        several = len(problems) > 1
        note = f" (one of {len(problems):,} broken images, each is logged)" if several else ""
        remedy = "; data.broken=skip leaves such images out" if broken else ""
        raise ValueError(f"data: {first}{note}{remedy}.")
    intact = [[(path, label) for path, label in part if path not in problems] for part in parts]
    if not all(intact):
        raise ValueError(f"data: {first}; no image is left in one of the splits of {root}.")
    return intact
