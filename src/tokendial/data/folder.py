"""Image folders: one folder for each split, in it one folder for each class."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokendial.data.images import images_in
from tokendial.data.labelled import Files
from tokendial.data.pixels import ValueRange, check_range, named, warn_of_unused_range
from tokendial.data.splits import Splits
from tokendial.methods import register

Labelled = list[tuple[Path, int]]
"""Files and the indices of their classes."""


@register("data", "image_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Images in `root/train/CLASS/` and `root/val/CLASS/`."""

    root: str
    """Folder that holds the splits."""
    train: str = "train"
    """Name of the training folder."""
    val: str = "val"
    """Name of the validation folder."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files.

        Raises:
            ValueError: If a folder is missing or empty, the validation set has a class that the
                training set has not, or nothing says what is black and white.
        """
        train, val, classes = read_folders(Path(self.root), self.train, self.val, self.range)
        warn_of_unused_range(named(path for path, _ in train.files), self.range, self.root)
        return Splits(train=train, val=val, classes=classes)


def read_folders(
    root: Path, train: str, val: str, value_range: ValueRange = None
) -> tuple[Files, Files, tuple[str, ...]]:
    """The images of two folders with one folder for each class, and the names of the classes.

    Raises:
        ValueError: As `list_folders`.
    """
    of_train, of_val, classes = list_folders(root, train, val, images_in, "images")
    return Files(of_train, value_range), Files(of_val, value_range), classes


def list_folders(
    root: Path, train: str, val: str, files_in: Callable[[Path], list[Path]], kind: str
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """The files of two folders with one folder for each class, and the names of the classes.

    Args:
        root: Folder that holds the two.
        train: Name of the training folder.
        val: Name of the validation folder.
        files_in: Finds the files of a class.
        kind: What they are, for messages.

    Raises:
        ValueError: If a folder is missing or empty, or the validation set has a class that the
            training set has not.
    """
    if not root.is_dir():
        raise ValueError(f"data.root: no such folder: {root}.")
    of_train, of_val = (_class_folders(root, name, files_in, kind) for name in (train, val))
    if unknown := sorted(set(of_val) - set(of_train)):
        raise ValueError(
            f"data.val: class {unknown[0]!r} of {root / val} is not in {root / train}."
        )
    numbers = {name: number for number, name in enumerate(of_train)}
    return _labelled(of_train, numbers), _labelled(of_val, numbers), tuple(of_train)


def _labelled(by_class: dict[str, list[Path]], numbers: dict[str, int]) -> Labelled:
    return [(path, numbers[name]) for name, paths in by_class.items() for path in paths]


def _class_folders(
    root: Path, split: str, files_in: Callable[[Path], list[Path]], kind: str
) -> dict[str, list[Path]]:
    folder = root / split
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise ValueError(
            f"data: {root} has no folder {split!r}; it has {', '.join(there[:8]) or 'no folders'}."
        )
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ValueError(f"data: {folder} has no class folders.")
    found = {path.name: files_in(path) for path in classes}
    for name, files in found.items():
        if not files:
            raise ValueError(f"data: class folder {folder / name} holds no {kind}.")
    return found
