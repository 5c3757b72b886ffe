"""What sets of images with one label each share: how they are held, checked and split."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset

from tokendial.data.readers.checking import broken_images
from tokendial.data.readers.files import PATH, shown
from tokendial.data.readers.images import read_image
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.splits import Splits

Labelled = list[tuple[Path, int]]
"""Files and the indices of their classes."""
Broken = Literal["error", "skip"]
"""What to do about images that cannot be read: stop, or leave them out."""
_LOG = logging.getLogger(__name__)


class Files(Dataset[tuple[Image.Image, int]]):
    """Reads image `i` of a list when it is asked for."""

    def __init__(self, files: Sequence[tuple[Path, int]], value_range: ValueRange = None) -> None:
        self.files, self.value_range = list(files), value_range

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return read_image(path, self.value_range), label

    @property
    def labels(self) -> list[int]:
        """Of all images, in order."""
        return [label for _, label in self.files]


class Arrays(Dataset[tuple[Image.Image, int]]):
    """Images of one size that fit into memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Hold `images` [N, H, W, 3] uint8 and `labels` [N]."""
        self.images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self._labels[index])

    @property
    def labels(self) -> list[int]:
        """Of all images, in order."""
        labels: list[int] = self._labels.tolist()
        return labels


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSet:
    """Fields of the sets that are published as a training and a test set."""

    root: str = field(metadata=PATH)
    """Folder of the set."""
    val: Literal["val", "test"] = "test"
    """What is validated on. val: images kept back from training, to choose settings by; test: the
    official test set, for the final run."""
    holdout: float = 0.0
    """Share of the training set that is kept back, whatever is validated on; drawn with the
    recipe's seed, class by class."""
    check: bool = True
    """Whether the numbers of images and classes must be those of the whole set; false: parts of
    it will do."""

    def __post_init__(self) -> None:
        if self.val not in ("val", "test"):
            raise ValueError(f"val must be one of val, test, got {self.val!r}.")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}.")

    def check_count(self, what: str, got: int, expected: int) -> None:
        """Check a number of images or classes, as `check` says."""
        check_count(what, got, expected, strict=self.check)

    def splits(
        self, train: Files | Arrays, test: Files | Arrays, classes: Sequence[str], seed: int
    ) -> Splits:
        """Keep back what the fields say; images that are files are read, to see that they can be.

        Raises:
            ValueError: If nothing is kept back and that is to be validated on, or an image cannot
                be read.
        """
        whole_images(Path(self.root), [s.files for s in (train, test) if isinstance(s, Files)])
        kept, held = split_off(train.labels, self.holdout, seed)
        if self.val == "val" and not held:
            raise ValueError(
                f"data.holdout must keep back at least one image for data.val=val, "
                f"got {self.holdout}."
            )
        return Splits(
            train=Subset(train, kept) if held else train,
            val=Subset(train, held) if self.val == "val" else test,
            classes=tuple(classes),
        )


def split_off(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices at random into those that stay and a share of each class; both are sorted."""
    rng = np.random.default_rng(seed)
    numbers = np.asarray(labels)
    held: list[int] = []
    for label in np.unique(numbers):
        of_class = rng.permutation(np.flatnonzero(numbers == label))
        # One stays, however large the share is: no class is without an image to train on.
        held += of_class[: min(round(share * len(of_class)), len(of_class) - 1)].tolist()
    kept = np.setdiff1d(np.arange(len(numbers)), held)
    return kept.tolist(), sorted(held)


def check_broken(value: str) -> None:
    """Raise a ValueError if a field `broken` has another value than it can have."""
    if value not in ("error", "skip"):
        raise ValueError(f"broken must be one of error, skip, got {value!r}.")


def whole_images(
    root: Path,
    parts: Sequence[Labelled],
    broken: Broken | None = None,
    value_range: ValueRange = None,
) -> list[Labelled]:
    """Parts of a set without the images that cannot be read; every one is read to find out.

    Args:
        root: Folder of the set.
        parts: Files below it.
        broken: What to do about them; None: stop, as images of this set cannot be left out.
        value_range: What is black and white in files of more than 8 bits.

    Raises:
        ValueError: If an image cannot be read and `broken` is not skip, or none is left of a part.
    """
    problems = broken_images(root, [path for part in parts for path, _ in part], value_range)
    if not problems:
        return list(parts)
    if broken == "skip" or len(problems) > 1:
        for problem in problems.values():
            _LOG.warning("%s: %s", "left out" if broken == "skip" else "broken", problem)
    if broken != "skip":
        first, *others = problems.values()
        several = f" (one of {len(problems):,} broken images, each is logged)" if others else ""
        way_out = "; data.broken=skip leaves such images out" if broken else ""
        raise ValueError(f"data: {first}{several}{way_out}.")
    kept = [[(path, label) for path, label in part if path not in problems] for part in parts]
    if not all(kept):
        raise ValueError(
            f"data: {next(iter(problems.values()))}; none is left of a part of {root}."
        )
    return kept


def check_count(what: str, got: int, expected: int, *, strict: bool) -> None:
    """Check a number of images or classes.

    Raises:
        ValueError: If it is zero, or, where `strict`, another one than expected.
    """
    if not got or (strict and got != expected):
        way_out = "; data.check=false takes parts of the set" if got else ""
        raise ValueError(f"data: {what} must be {expected:,}, got {got:,}{way_out}.")


def required_file(path: Path, source: str) -> Path:
    """The path of a file that must be there.

    Raises:
        ValueError: If it is not; `source` tells where to get it.
    """
    if not path.is_file():
        raise ValueError(f"data: no such file: {shown(path)}. {source}")
    return path


def required_folder(path: Path, source: str) -> Path:
    """The path of a folder that must be there.

    Raises:
        ValueError: If it is not; `source` tells where to get it.
    """
    if not path.is_dir():
        raise ValueError(f"data.root: no such folder: {shown(path)}. {source}")
    return path


def read_lines(path: Path, source: str) -> Iterator[tuple[str, str]]:
    """The lines of a list that are not blank, each after its place, such as "train.txt, line 3".

    Raises:
        ValueError: If the list is missing (`source` tells where to get it), or no text.
    """
    try:
        text = required_file(path, source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"data: {path} is not a text file.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def read_pairs(path: Path, form: str, source: str) -> Iterator[tuple[str, str, str]]:
    """The lines of a list: the place of each, what stands before its last word, and that word.

    Raises:
        ValueError: If a line is a single word; `form` shows what lines look like.
    """
    for place, line in read_lines(path, source):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise ValueError(f"data: {place}: must look like {form!r}, got {line!r}.")
        yield place, words[0], words[1]


def read_number(text: str, what: str, first: int, last: int, place: str) -> int:
    """A whole number in a list.

    Raises:
        ValueError: If it is no number, or lies outside its range.
    """
    number = int(text) if text.isascii() and text.isdigit() else None
    if number is None or not first <= number <= last:
        raise ValueError(
            f"data: {place}: {what} must be a whole number in [{first}, {last}], got {text!r}."
        )
    return number


def existing(path: Path, place: str) -> Path:
    """The path of an image that a list names.

    Raises:
        ValueError: If there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"data: {place}: no such image: {path}.")
    return path
