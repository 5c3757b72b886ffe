"""Checks of a folder that `tokendial data check` reports: class folders, or images and masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokendial.data.readers.binary_masks import inspect_mask
from tokendial.data.readers.files import format_count
from tokendial.data.readers.images import ImageError, list_images
from tokendial.data.readers.integrity import find_broken_images
from tokendial.data.readers.mask_files import IGNORED
from tokendial.data.readers.pixels import ValueRange, sample_files, warn_of_unused_range
from tokendial.data.sets.folder import find_split_folders, read_class_folders, suggest_class
from tokendial.data.sets.pairs import Pair, Pairs, PairSet

_MAX_SHOWN_VALUES = 12


def check_folders(
    root: Path, train: str, val: str, value_range: ValueRange = None
) -> tuple[list[str], str]:
    """Return all problems of a folder of class folders, with or without splits.

    Every image is decoded.

    Args:
        root: Folder that holds the split folders, or the class folders.
        train: Name of the training folder; other names are found as `find_split_folders` does.
        val: Name of the validation folder; other names are found in the same way.
        value_range: Values that become black and white in images of more than 8 bits.

    Returns:
        One line for each class without images, each class that is in the validation set only, and
        each image that cannot be read; and one line that says how many images there are.

    Raises:
        ValueError: If the folders do not exist or have no class folders.
    """
    try:
        train_folder, val_folder = find_split_folders(root, train, val, 0.0)
    except ValueError:
        # Without a validation folder, the checks are those of a run with some `holdout`.
        train_folder, val_folder = find_split_folders(root, train, val, holdout=0.5)
    train_classes = read_class_folders(train_folder, list_images, "images")
    val_classes: dict[str, list[Path]] = {}
    problems = [
        f"class folder {train_folder / name} holds no images"
        for name, files in train_classes.items()
        if not files
    ]
    if val_folder is not None:
        val_classes = read_class_folders(val_folder, list_images, "images")
        problems += [
            f"class {name!r} of {val_folder} is not in {train_folder}"
            f"{suggest_class(name, train_classes)}"
            for name in val_classes
            if name not in train_classes
        ]
        problems += [
            f"class {name!r} has no images in {val_folder}"
            for name in train_classes
            if not val_classes.get(name)
        ]
    groups = [*train_classes.values(), *val_classes.values()]
    problems += find_broken_images(
        root, [p for group in groups for p in group], value_range
    ).values()
    num_train, num_val = (sum(map(len, part.values())) for part in (train_classes, val_classes))
    images = format_count(num_train, "image")
    classes = format_count(len(train_classes), "class")
    if val_folder is None:
        return problems, f"{images} of {classes}, no folder to validate on: see data.holdout"
    return problems, f"{images} of {classes} to train on, {num_val:,} to validate on"


@dataclass(slots=True)
class MaskStatistics:
    """Counts over the binary masks of a split."""

    split: str
    """Name of the split folder."""
    num_masks: int = 0
    """Number of masks that could be read."""
    num_empty: int = 0
    """Number of masks with no pixel inside."""
    num_full: int = 0
    """Number of masks with no pixel outside."""
    num_pixels: int = 0
    """Number of pixels that are not ignored."""
    num_inside: int = 0
    """Number of pixels that are inside."""

    def add(self, mask: np.ndarray) -> None:
        """Count a mask of 0, 1 and `IGNORED`."""
        inside, pixels = int((mask == 1).sum()), int((mask != IGNORED).sum())
        self.num_masks += 1
        self.num_inside += inside
        self.num_pixels += pixels
        self.num_empty += inside == 0
        self.num_full += inside == pixels > 0

    def __str__(self) -> str:
        share = self.num_inside / max(1, self.num_pixels)
        return (
            f"{self.split}: {share:.1%} of the pixels are inside; {self.num_empty:,} of "
            f"{format_count(self.num_masks, 'mask')} empty, {self.num_full:,} full"
        )


def check_pairs(data: Pairs, root: Path, notes: list[str] | None = None) -> Iterator[str]:
    """Yield one line for each problem of a folder of images and masks; every file is decoded.

    Args:
        data: Settings with which the folder is read.
        root: One of the root folders of `data`.
        notes: List to which two kinds of lines are appended: how binary masks are read, and how
            much of each split is inside.

    Yields:
        Problems: files without a partner, pairs whose sizes differ, files that cannot be read,
        masks with values outside the classes, binary masks that can be read in several ways or
        hold unexpected values, splits in which all masks are empty or all are full, and images that
        need `data.range` when it is not set.

    Raises:
        ValueError: If a folder is missing.
    """
    notes = [] if notes is None else notes
    by_split = {split: data.pairs(root, split) for split in (data.train, data.val)}
    for _, problems in by_split.values():
        yield from problems
    try:
        reading = data.mask_reading(root, [m for pairs, _ in by_split.values() for _, m in pairs])
        images = (image for pairs, _ in by_split.values() for image, _ in pairs)
        warn_of_unused_range(sample_files(images), data.range, root)
    except ValueError as error:
        yield str(error).rstrip(".")
        return
    if reading is not None:
        notes.append(f"inside are {reading}")
    read_mask = data.mask_reader(reading)
    for split, (pairs, _) in by_split.items():
        statistics = MaskStatistics(split)
        pair_set = PairSet([Pair(*pair, read_mask) for pair in pairs], data.range)
        for index, (_, mask_path) in enumerate(pairs):
            try:
                _, mask = pair_set[index]
            except ImageError as error:
                yield str(error).rstrip(".")
                continue
            if reading is not None:
                statistics.add(mask)
                if data.mask == "auto" and reading.rule == "half":
                    yield from _unexpected_values(mask_path)
        if reading is not None:
            notes.append(str(statistics))
            for count, state in ((statistics.num_empty, "empty"), (statistics.num_full, "full")):
                if count and count == statistics.num_masks:
                    yield f"{root / data.annotations / split}: all masks are {state}"


def _unexpected_values(path: Path) -> Iterator[str]:
    """Yield a line if a mask in a lossless format has more than two values."""
    content = inspect_mask(path)
    if content.is_lossy or len(content.codes) <= 2:
        return
    shown = ", ".join(map(str, sorted(content.codes)[:_MAX_SHOWN_VALUES]))
    more = ", ..." if len(content.codes) > _MAX_SHOWN_VALUES else ""
    yield f"{path} is not binary: it has {len(content.codes)} values ({shown}{more})"
