"""Image folders: one folder for each split, in it one folder for each class."""

import difflib
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tokendial.data.readers.checking import broken_images
from tokendial.data.readers.files import PATH, of_a_system, shown, warn_of_others
from tokendial.data.readers.images import images_in
from tokendial.data.readers.pixels import ValueRange, check_range, named, warn_of_unused_range
from tokendial.data.sets.labelled import (
    Broken,
    Files,
    Labelled,
    check_broken,
    split_off,
    whole_images,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

_SAME_AS = {"train": ("training",), "val": ("valid", "validation", "test")}
"""Other names, in order of preference, of the folders that the defaults name."""
_LOG = logging.getLogger(__name__)


class FindsFiles(Protocol):
    """Finds the files of a kind below a folder."""

    def __call__(self, folder: Path, others: Counter[str] | None = None) -> list[Path]:
        """Sorted; endings of other files are counted in `others`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFolders:
    """Fields of sets that are a folder for each split with a folder for each class."""

    root: str = field(metadata=PATH)
    """Folder that holds the splits; with `holdout` it may hold the classes themselves."""
    train: str = "train"
    """Name of the training folder; without a folder train, training is taken as well."""
    val: str = "val"
    """Name of the validation folder; without a folder val, the first that is there of valid,
    validation and test is taken."""
    holdout: float = 0.0
    """Share of the training files that is validated on, where there is no folder for validation
    (a folder test is then left alone); drawn with the recipe's seed, class by class."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}.")

    def listed(
        self, files_in: FindsFiles, kind: str, seed: int
    ) -> tuple[Labelled, Labelled, tuple[str, ...]]:
        """The files to train and to validate on, and the names of the classes.

        Raises:
            ValueError: As `split_folders` and `list_folders`; or if nothing is held out.
        """
        train, val = split_folders(Path(self.root), self.train, self.val, self.holdout)
        if val is not None:
            return list_folders(train, val, files_in, kind)
        of_train, names = list_classes(train, files_in, kind)
        kept, held = split_off([label for _, label in of_train], self.holdout, seed)
        if not held:
            raise ValueError(
                f"data.holdout must hold out at least one of the {kind} in {train}, "
                f"got {self.holdout}."
            )
        return [of_train[i] for i in kept], [of_train[i] for i in held], names


@register("data", "image_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder(ClassFolders):
    """Images in `root/train/CLASS/` and `root/val/CLASS/`, or with `holdout` in `root/CLASS/`."""

    broken: Broken = "error"
    """What to do about images that cannot be read; every one is read before the run begins. error:
    stop, with a line about each; skip: report them and leave them out."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        ClassFolders.__post_init__(self)
        check_broken(self.broken)
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files and read every image.

        Raises:
            ValueError: If a folder is missing or empty, the validation set has a class that the
                training set has not, an image cannot be read and `broken` does not say to skip
                it, or nothing says what is black and white.
        """
        train, val, classes = self.listed(images_in, "images", seed)
        warn_of_unused_range(named(path for path, _ in train), self.range, self.root)
        train, val = whole_images(Path(self.root), [train, val], self.broken, self.range)
        if emptied := set(range(len(classes))) - {label for _, label in train}:
            raise ValueError(
                f"data: no image of class {classes[min(emptied)]!r} in {self.root} can be read."
            )
        return Splits(train=Files(train, self.range), val=Files(val, self.range), classes=classes)


def split_folders(root: Path, train: str, val: str, holdout: float) -> tuple[Path, Path | None]:
    """The folders to train and to validate on; None: a share of the former is held out.

    Args:
        root: Folder that holds them, or with `holdout` the classes.
        train: Name of the training folder; train stands for training, too.
        val: Name of the validation folder; val stands for valid, validation and test, too.
        holdout: Share that is held out.

    Raises:
        ValueError: If a folder is missing, or there is one to validate on and `holdout` is not 0.
    """
    if not root.is_dir():
        raise ValueError(f"data.root: no such folder: {shown(root)}.")
    there = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    of_train, of_val = _named(there, train), _named(there, val)
    if holdout:
        if of_val is not None and (of_val.name.lower() != "test" or val == of_val.name):
            raise ValueError(
                f"data.holdout must be 0, as {root} has the folder {of_val.name} to validate on, "
                f"got {holdout}."
            )
        # The classes themselves are in `root` if nothing says where else.
        if of_train is not None or (of_val is None and train in _SAME_AS):
            return of_train or root, None
    for wanted, found in ((train, of_train), (val, of_val)):
        if found is None:
            names = [name for name in there if not of_a_system(name)]
            raise ValueError(
                f"data: {root} has no folder {wanted!r}; it has {_listed(names) or 'no folders'}."
                f"{_way_out(train, of_train, of_val, names)}"
            )
    assert of_train is not None  # a missing one was told of
    if of_val is not None and of_val.name != val and of_val.name.lower() == "test":
        _LOG.warning("%s has no folder %s: validating on %s", root, val, of_val.name)
    return of_train, of_val


def _named(there: dict[str, Path], name: str) -> Path | None:
    if name in there:
        return there[name]
    # Names of splits are written in any case; exact ones come first.
    lower = {found.lower(): path for found, path in there.items()}
    wanted = [name, *_SAME_AS[name]] if name in _SAME_AS else []
    return next((lower[other] for other in wanted if other in lower), None)


def _way_out(train: str, of_train: Path | None, of_val: Path | None, names: list[str]) -> str:
    if of_train is not None:
        return " data.holdout=0.2 validates on a fifth of the training set."
    if of_val is None and names and train in _SAME_AS:
        return " If these are classes, data.holdout=0.2 validates on a fifth of each."
    return ""


def list_folders(
    train: Path, val: Path, files_in: FindsFiles, kind: str
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """The files of two folders with one folder for each class, and the names of the classes.

    Names of classes are the same if they look the same (Unicode's NFC): file systems write them
    differently. A class that has no files in `val` is for `warn_of_absent_classes` to tell.

    Args:
        train: Training folder.
        val: Validation folder.
        files_in: Finds the files of a class.
        kind: What they are, for messages.

    Raises:
        ValueError: If a folder is missing or empty, or the validation set has a class that the
            training set has not.
    """
    of_train, names = list_classes(train, files_in, kind)
    numbers = {name: number for number, name in enumerate(names)}
    of_val = _class_folders(val, files_in, kind)
    if unknown := [name for name in of_val if name not in numbers]:
        more = f" (and {len(unknown) - 1} more classes)" if len(unknown) > 1 else ""
        raise ValueError(
            f"data.val: class {unknown[0]!r} of {val} is not in {train}{more}"
            f"{_resembled(unknown[0], names)}."
        )
    listed = [(path, numbers[name]) for name, files in of_val.items() for path in files]
    if not listed:
        raise ValueError(f"data: the class folders of {val} hold no {kind}.")
    return of_train, listed, names


def list_classes(folder: Path, files_in: FindsFiles, kind: str) -> tuple[Labelled, tuple[str, ...]]:
    """The files of a folder with one folder for each class, and the names of the classes.

    Raises:
        ValueError: If the folder is missing or has no classes, or a class has no files.
    """
    found = _class_folders(folder, files_in, kind)
    for name, files in found.items():
        if not files:
            raise ValueError(f"data: class folder {folder / name} holds no {kind}.")
    listed = [(path, label) for label, files in enumerate(found.values()) for path in files]
    return listed, tuple(found)


def check_folders(
    root: Path, train: str, val: str, value_range: ValueRange = None
) -> tuple[list[str], str]:
    """All that is wrong with a folder of classes, with splits or without, every image read.

    Args:
        root: Folder that holds the splits, or the classes.
        train: Name of the training folder, as `split_folders` takes it.
        val: Name of the validation folder, likewise.
        value_range: What is black and white in files of more than 8 bits.

    Returns:
        A line about each class that has no images, or is in one split alone, and each image that
        cannot be read; and in one line what there is.

    Raises:
        ValueError: If there are no such folders, or no classes in them.
    """
    try:
        of_train, of_val = split_folders(root, train, val, 0.0)
    except ValueError:
        of_train, of_val = split_folders(root, train, val, holdout=0.5)
    trained = _class_folders(of_train, images_in, "images")
    validated = {} if of_val is None else _class_folders(of_val, images_in, "images")
    problems = [f"class folder {of_train / n} holds no images" for n, f in trained.items() if not f]
    if of_val is not None:
        problems += [
            f"class {name!r} of {of_val} is not in {of_train}{_resembled(name, trained)}"
            for name in validated
            if name not in trained
        ]
        problems += [
            f"class {name!r} has no images in {of_val}"
            for name in trained
            if not validated.get(name)
        ]
    files = [path for part in (trained, validated) for some in part.values() for path in some]
    problems += broken_images(root, files, value_range).values()
    to_train = f"{sum(map(len, trained.values())):,} images of {len(trained):,} classes"
    if of_val is None:
        return problems, f"{to_train}, no folder to validate on: see data.holdout"
    return problems, f"{to_train} to train on, {sum(map(len, validated.values())):,} to validate on"


def _class_folders(folder: Path, files_in: FindsFiles, kind: str) -> dict[str, list[Path]]:
    """Files by class, classes sorted; what is passed over on the way is logged."""
    if not folder.is_dir():
        raise ValueError(f"data: no such folder: {shown(folder)}.")
    entries = sorted(path for path in folder.iterdir() if not of_a_system(path.name))
    classes = [path for path in entries if path.is_dir()]
    if not classes:
        raise ValueError(f"data: {folder} has no class folders.")
    others: Counter[str] = Counter()
    found: dict[str, list[Path]] = {}
    for path in classes:
        name = unicodedata.normalize("NFC", path.name)
        found.setdefault(name, []).extend(files_in(path, others))
    warn_of_others(others, kind.removesuffix("s"), folder)
    if loose := len(entries) - len(classes):
        _LOG.warning("%s: left out %s file(s) that lie in no class folder", folder, f"{loose:,}")
    return dict(sorted(found.items()))


def _resembled(name: str, names: Iterable[str]) -> str:
    """Says which class may be meant."""
    by_lower = {other.lower().strip(): other for other in names}
    near = difflib.get_close_matches(name.lower().strip(), by_lower, n=1)
    return f", which has {by_lower[near[0]]!r}: rename one if they are the same" if near else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
