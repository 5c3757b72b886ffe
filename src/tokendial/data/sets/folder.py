"""Image folders: one folder for each split, in it one folder for each class."""

import difflib
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tokendial.data.readers.files import (
    PATH,
    format_count,
    format_more,
    format_path,
    is_system_name,
    warn_of_other_files,
)
from tokendial.data.readers.images import list_images
from tokendial.data.readers.pixels import (
    ValueRange,
    check_range,
    sample_files,
    warn_of_unused_range,
)
from tokendial.data.sets.labelled_images import (
    Broken,
    ImageFiles,
    LabelledFiles,
    check_broken,
    drop_broken_images,
)
from tokendial.data.splits import Splits, hold_out
from tokendial.methods import register

_OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "test")}
"""Other names that the default split folders may have, in order of preference."""
_MAX_LISTED_NAMES = 8
_LOG = logging.getLogger(__name__)


class FindFiles(Protocol):
    """Function that finds the files of one kind below a folder."""

    def __call__(self, folder: Path, other_suffixes: Counter[str] | None = None) -> list[Path]:
        """Return the files, sorted, and count the endings of other files in `other_suffixes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFolders:
    """Fields of data sets with a folder for each split and in it a folder for each class."""

    root: str = field(metadata=PATH)
    """Folder that holds the split folders. With `holdout` it may hold the class folders itself."""
    train: str = "train"
    """Name of the training folder. If there is no folder `train`, a folder `training` is used."""
    val: str = "val"
    """Name of the validation folder. If there is no folder `val`, the first that exists of `valid`,
    `validation` and `test` is used."""
    holdout: float = 0.0
    """Fraction of the training files, in [0, 1), to validate on if there is no validation folder. A
    folder `test` is then not used. The files are drawn class by class with the recipe's seed."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}.")

    def list_splits(
        self, find_files: FindFiles, kind: str, seed: int
    ) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...]]:
        """Return the training files, the validation files and the names of the classes.

        Args:
            find_files: Finds the files of a class.
            kind: Plural noun for the files in messages, such as "images".
            seed: Seed of the random draw for `holdout`.

        Raises:
            ValueError: For the reasons of `find_split_folders` and `list_folders`, or if `holdout`
                is so small that no file is held out.
        """
        train, val = find_split_folders(Path(self.root), self.train, self.val, self.holdout)
        if val is not None:
            return list_folders(train, val, find_files, kind)
        files, names = list_classes(train, find_files, kind)
        kept, held = hold_out([label for _, label in files], self.holdout, seed)
        if not held:
            raise ValueError(
                f"data.holdout must hold out at least one of the {kind} in {train}, "
                f"got {self.holdout}."
            )
        return [files[i] for i in kept], [files[i] for i in held], names


@register("data", "image_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder(ClassFolders):
    """Images in `root/train/CLASS/` and `root/val/CLASS/`, or with `holdout` in `root/CLASS/`."""

    broken: Broken = "error"
    """What to do with images that cannot be read. Every image is decoded before the run begins.
    error: log each broken image and stop; skip: log each broken image and leave it out."""
    range: ValueRange = None
    """Values that become black and white in grey images of more than 8 bits, such as [0, 4095].
    image: the smallest and largest value of each image; null: the limits of the file's number
    type."""

    def __post_init__(self) -> None:
        ClassFolders.__post_init__(self)
        check_broken(self.broken)
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files and decode every image.

        Raises:
            ValueError: If a folder is missing or empty, the validation set has a class that the
                training set lacks, an image cannot be read and `broken` is "error", or images need
                `range` and it is null.
        """
        train, val, classes = self.list_splits(list_images, "images", seed)
        warn_of_unused_range(sample_files(path for path, _ in train), self.range, self.root)
        train, val = drop_broken_images(Path(self.root), [train, val], self.broken, self.range)
        if emptied := set(range(len(classes))) - {label for _, label in train}:
            raise ValueError(
                f"data: no image of class {classes[min(emptied)]!r} in {self.root} can be read."
            )
        return Splits(
            train=ImageFiles(train, self.range),
            val=ImageFiles(val, self.range),
            classes=classes,
        )


def find_split_folders(
    root: Path, train: str, val: str, holdout: float
) -> tuple[Path, Path | None]:
    """Return the training folder and the validation folder.

    The latter is None if a fraction of the training files is to be held out instead.

    Args:
        root: Folder that holds the split folders, or with `holdout` the class folders.
        train: Name of the training folder; "train" also finds "training".
        val: Name of the validation folder; "val" also finds "valid", "validation" and "test".
        holdout: Fraction of the training files that is held out.

    Raises:
        ValueError: If a folder is missing, or there is a validation folder and `holdout` is not 0.
    """
    if not root.is_dir():
        raise ValueError(f"data.root: no such folder: {format_path(root)}.")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    train_folder, val_folder = _find_folder(folders, train), _find_folder(folders, val)
    if holdout:
        # A folder `test` is kept for a final test, unless `val` names it.
        if val_folder is not None and (val_folder.name.lower() != "test" or val == val_folder.name):
            raise ValueError(
                f"data.holdout must be 0, as {root} has the folder {val_folder.name} to validate "
                f"on, got {holdout}."
            )
        # Without split folders, and without a name that the user chose, the classes are in `root`.
        if train_folder is not None or (val_folder is None and train in _OTHER_NAMES):
            return train_folder or root, None
    for name, folder in ((train, train_folder), (val, val_folder)):
        if folder is None:
            names = [found for found in folders if not is_system_name(found)]
            raise ValueError(
                f"data: {root} has no folder {name!r}; it has {_join(names) or 'no folders'}."
                f"{_suggest_holdout(train, train_folder, val_folder, names)}"
            )
    assert train_folder is not None  # the loop has raised otherwise
    if val_folder is not None and val_folder.name != val and val_folder.name.lower() == "test":
        _LOG.warning("%s has no folder %s: validating on %s", root, val, val_folder.name)
    return train_folder, val_folder


def _find_folder(folders: dict[str, Path], name: str) -> Path | None:
    """Return the folder of this name, or of one of its other names, in upper or lower case."""
    if name in folders:
        return folders[name]
    by_lower = {found.lower(): path for found, path in folders.items()}
    names = [name, *_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    return next((by_lower[other] for other in names if other in by_lower), None)


def _suggest_holdout(
    train: str, train_folder: Path | None, val_folder: Path | None, names: list[str]
) -> str:
    if train_folder is not None:
        return " data.holdout=0.2 validates on a fifth of the training set."
    if val_folder is None and names and train in _OTHER_NAMES:
        return " If these are classes, data.holdout=0.2 validates on a fifth of each."
    return ""


def list_folders(
    train: Path, val: Path, find_files: FindFiles, kind: str
) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...]]:
    """Return the files of two folders of class folders, and the names of the classes.

    Class names are compared in Unicode's form NFC, because file systems store the same name in
    different forms. A class without files in `val` is accepted here; `warn_of_absent_classes` logs
    it.

    Args:
        train: Training folder.
        val: Validation folder.
        find_files: Finds the files of a class.
        kind: Plural noun for the files in messages, such as "images".

    Raises:
        ValueError: If a folder is missing or empty, or the validation set has a class that the
            training set lacks.
    """
    train_files, names = list_classes(train, find_files, kind)
    label_of = {name: label for label, name in enumerate(names)}
    val_classes = read_class_folders(val, find_files, kind)
    if unknown := [name for name in val_classes if name not in label_of]:
        raise ValueError(
            f"data.val: class {unknown[0]!r} of {val} is not in {train}"
            f"{format_more(len(unknown) - 1, 'class')}{suggest_class(unknown[0], names)}."
        )
    val_files = [(path, label_of[name]) for name, files in val_classes.items() for path in files]
    if not val_files:
        raise ValueError(f"data: the class folders of {val} hold no {kind}.")
    return train_files, val_files, names


def list_classes(
    folder: Path, find_files: FindFiles, kind: str
) -> tuple[LabelledFiles, tuple[str, ...]]:
    """Return the files of a folder of class folders, and the names of the classes.

    Raises:
        ValueError: If the folder is missing or has no class folders, or a class has no files.
    """
    classes = read_class_folders(folder, find_files, kind)
    for name, files in classes.items():
        if not files:
            raise ValueError(f"data: class folder {folder / name} holds no {kind}.")
    labelled = [(path, label) for label, files in enumerate(classes.values()) for path in files]
    return labelled, tuple(classes)


def read_class_folders(folder: Path, find_files: FindFiles, kind: str) -> dict[str, list[Path]]:
    """Return the files of each class by its name, classes sorted; log what is left out.

    Raises:
        ValueError: If the folder is missing or has no class folders.
    """
    if not folder.is_dir():
        raise ValueError(f"data: no such folder: {format_path(folder)}.")
    entries = sorted(path for path in folder.iterdir() if not is_system_name(path.name))
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        raise ValueError(f"data: {folder} has no class folders.")
    other_suffixes: Counter[str] = Counter()
    classes: dict[str, list[Path]] = {}
    for path in class_folders:
        name = unicodedata.normalize("NFC", path.name)
        classes.setdefault(name, []).extend(find_files(path, other_suffixes))
    warn_of_other_files(other_suffixes, kind.removesuffix("s"), folder)
    if loose := len(entries) - len(class_folders):
        files = format_count(loose, "file")
        _LOG.warning("%s: left out %s outside of the class folders", folder, files)
    return dict(sorted(classes.items()))


def suggest_class(name: str, names: Iterable[str]) -> str:
    """Return the end of a message that names the class which `name` resembles; empty if none."""
    by_lower = {other.lower().strip(): other for other in names}
    near = difflib.get_close_matches(name.lower().strip(), by_lower, n=1)
    return f", which has {by_lower[near[0]]!r}: rename one if they are the same" if near else ""


def _join(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED_NAMES]) + (
        ", ..." if len(names) > _MAX_LISTED_NAMES else ""
    )
