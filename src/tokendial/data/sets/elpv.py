"""ELPV: 2,624 electroluminescence pictures of solar cells, with the probability of a defect.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 185, 2019; https://github.com/zae-bayern/elpv-dataset.
The authors publish no split, so a seeded one is drawn here.
"""

import hashlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from tokendial import checks
from tokendial.data.readers.files import PATH, format_path
from tokendial.data.readers.lists import read_lines, require_image
from tokendial.data.sets.labelled_images import ImageFiles, drop_broken_images
from tokendial.data.sets.official import check_count
from tokendial.data.splits import Splits, hold_out
from tokendial.extras import MissingPackageError, install_hint
from tokendial.methods import register

_PACKAGE = "elpv_dataset"
_NUM_IMAGES = 2_624
_SHA256 = "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d"
"""SHA-256 of labels.csv in elpv-dataset 1.0.0.post1."""
_SOURCE = "ELPV, https://github.com/zae-bayern/elpv-dataset, holds labels.csv and images/."
_TYPES = ("mono", "poly")
CLASSES = {
    "defect": ("sound", "defective"),
    "grade": ("sound", "probably sound", "probably defective", "defective"),
    "type": _TYPES,
}
"""Names of the classes by task."""


class _Cell(NamedTuple):
    image: Path
    grade: int
    """Thirds of the probability of a defect: 0 to 3."""
    type: int
    """Index in `_TYPES`."""

    def label(self, task: str) -> int:
        """Return the index of the cell's class in a task."""
        return {"defect": int(self.grade >= 2), "grade": self.grade, "type": self.type}[task]


@register("data", "elpv")
@dataclass(frozen=True, kw_only=True, slots=True)
class ELPV:
    """Solar cells (ELPV): `labels.csv` and `images/`, with a seeded test set."""

    root: str | None = field(default=None, metadata=PATH)
    """Folder of the package elpv-dataset, or its folder `data`, which holds labels.csv. null reads
    the installed package: pip install 'tokendial[real]'."""
    task: Literal["defect", "grade", "type"] = "defect"
    """What to tell apart. defect: sound or defective cells (the probability of a defect is at least
    1/2); grade: the four probabilities 0, 1/3, 2/3, 1; type: mono- or polycrystalline silicon."""
    val: Literal["val", "test"] = "test"
    """Images to validate on. val: images held out of the training set, for choosing settings; test:
    the test set, for the final run."""
    holdout: float = 0.0
    """Fraction of the images outside the test set, in [0, 1), that is held out of training.
    `val: val` validates on it; `val: test` leaves it unused."""
    test_share: float = 0.25
    """Fraction of all images, in (0, 1), that is the test set. It is drawn separately from each
    combination of grade and type, so that both keep their proportions."""
    split_seed: int = 0
    """Seed of the test set and of the held-out images. All tasks, and all seeds of the recipe, have
    the same split."""
    check: bool = True
    """Whether labels.csv must be the published one, with its 2,624 images. Set to false to use a
    part of the data set."""

    def __post_init__(self) -> None:
        checks.check_choice("task", self.task, tuple(CLASSES))
        checks.check_choice("val", self.val, ("val", "test"))
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}.")
        if not 0.0 < self.test_share < 1.0:
            raise ValueError(f"test_share must lie in (0, 1), got {self.test_share}.")
        checks.check_count("split_seed", self.split_seed, at_least=0)

    def build(self, seed: int) -> Splits:
        """Read the list and draw the split; the recipe's seed does not change it.

        Raises:
            ValueError: If the package or the folder is missing, a line or an image cannot be read,
                or the list is not as published.
        """
        folder = self._folder()
        cells = self._read_list(folder / "labels.csv")
        drop_broken_images(folder, [[(cell.image, cell.grade) for cell in cells]])
        rest, test = self._draw(cells, self.test_share)
        train, held = self._draw(rest, self.holdout)
        if not test:
            raise ValueError(
                f"data.test_share must take at least one of {len(cells):,} images for the test "
                f"set, got {self.test_share}."
            )
        if self.val == "val" and not held:
            raise ValueError(
                f"data.holdout must hold out at least one image for data.val=val, "
                f"got {self.holdout}."
            )
        return Splits(
            train=self._labelled(train),
            val=self._labelled(held if self.val == "val" else test),
            classes=CLASSES[self.task],
        )

    def _folder(self) -> Path:
        """Return the folder that holds labels.csv."""
        if self.root is None:
            # Importing the package would run its code, of which nothing is needed.
            spec = find_spec(_PACKAGE)
            if spec is None or not spec.submodule_search_locations:
                raise MissingPackageError(
                    f"data.name=elpv without data.root needs {install_hint(_PACKAGE)}",
                    name=_PACKAGE,
                )
            root = Path(spec.submodule_search_locations[0])
        else:
            root = Path(self.root)
            if not root.is_dir():
                raise ValueError(f"data.root: no such folder: {format_path(root)}. {_SOURCE}")
        inner = root / "data"
        return inner if (inner / "labels.csv").is_file() else root

    def _read_list(self, path: Path) -> list[_Cell]:
        cells: dict[Path, _Cell] = {}
        for place, line in read_lines(path, _SOURCE):
            cell = _parse_line(line, path.parent, place)
            if cell.image in cells:
                raise ValueError(f"data: {place}: {cell.image} is listed twice.")
            cells[cell.image] = cell
        check_count(f"number of images in {path}", len(cells), _NUM_IMAGES, strict=self.check)
        if self.check and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != _SHA256:
            raise ValueError(
                f"data: SHA-256 of {path} must be {_SHA256}, got {found}; data.check=false accepts "
                "other labels."
            )
        return list(cells.values())

    def _draw(self, cells: list[_Cell], share: float) -> tuple[list[_Cell], list[_Cell]]:
        """Split cells at random, for each grade and type, into (kept, drawn)."""
        strata = [len(_TYPES) * cell.grade + cell.type for cell in cells]
        kept, drawn = hold_out(strata, share, self.split_seed)
        return [cells[index] for index in kept], [cells[index] for index in drawn]

    def _labelled(self, cells: list[_Cell]) -> ImageFiles:
        return ImageFiles([(cell.image, cell.label(self.task)) for cell in cells])


def _parse_line(line: str, folder: Path, place: str) -> _Cell:
    """Return the cell of a line such as "images/cell0001.png  0.3333333333333333  mono"."""
    words = line.split()
    grade = _parse_grade(words[1]) if len(words) == 3 else None
    if grade is None or words[2] not in _TYPES:
        raise ValueError(
            f"data: {place}: must be a path, a probability (0, 1/3, 2/3 or 1 as decimal number) "
            f"and mono or poly, got {line!r}."
        )
    return _Cell(require_image(folder / words[0], place), grade, _TYPES.index(words[2]))


def _parse_grade(text: str) -> int | None:
    """Return a probability in thirds; None unless it is one of the four, to two decimals."""
    try:
        probability = float(text)
    except ValueError:
        return None
    return next((n for n in range(4) if abs(probability - n / 3) < 0.01), None)
