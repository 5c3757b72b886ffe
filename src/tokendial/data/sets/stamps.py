"""Pictures of one photographed object on a photograph, composed of files of Debian packages.

The class of an object is the folder of its file, such as animals/birds. Objects and photographs of
the background are each in one of three parts: training, validation, test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tokendial.checks import check_choice, check_count
from tokendial.data.readers.files import PATH
from tokendial.data.readers.stamps import (
    BACKGROUNDS,
    PARTS,
    STAMPS,
    Background,
    Cutout,
    classes_by_folder,
    deal,
    load_backgrounds,
    load_cutouts,
)
from tokendial.data.sets.stamp_scenes import (
    crop_photograph,
    freest_place,
    paste_sprite,
    random_sprite,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

T = TypeVar("T")

MIN_OBJECTS = 5
"""Least number of objects of a class: three to train on, one to validate on, one to test on."""
_VAL_EVERY, _TEST_EVERY = 6, 3
_MIN_SIDE, _MAX_SIDE = 32, 1024
_MAX_SHARE = 0.5


@register("data", "stamps")
@dataclass(frozen=True, kw_only=True, slots=True)
class Stamps:
    """Pictures of one photographed object on a photograph, with its class or its exact mask."""

    task: Literal["category", "mask"] = "category"
    """Task to learn. category: the folder of the object, such as animals/birds (25 classes with
    Debian's stamps); mask: which pixels belong to an object."""
    val: Literal["val", "test"] = "test"
    """Part to validate on. val: objects and backgrounds for choosing settings; test: those for the
    final run. No object and no background is in two parts. Of a class, about a sixth of the objects
    is in val, a third in test, the rest in training."""
    train_size: int = 2000
    """Number of training pictures."""
    val_size: int = 1000
    """Number of pictures to validate on."""
    img_size: int = 224
    """Side of a picture in pixels, from 32 to 1024."""
    min_share: float = 0.05
    """Least fraction of the picture that an object covers. Long objects cover less, because no side
    is longer than three quarters of the picture."""
    max_share: float = 0.3
    """Largest fraction of the picture that an object covers, at most 0.5."""
    clutter: int = 0
    """Number of further objects in each picture, none of which has a class. With the task mask they
    belong to the mask."""
    split_seed: int = 0
    """Seed that deals objects and backgrounds to training, validation and test."""
    stamps: str = field(default=str(STAMPS), metadata=PATH)
    """Folder of PNG files with alpha, in folders by category. The default is where Debian's package
    tuxpaint-stamps-default installs them. Files that are known as drawings are left out."""
    backgrounds: list[str] | None = field(default=None, metadata=PATH)
    """Photographs for the background: files, and folders that are searched. null: 15 photographs
    of Debian's packages mate-backgrounds and plasma-workspace-wallpapers."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("category", "mask"))
        check_choice("val", self.val, ("val", "test"))
        check_count("train_size", self.train_size)
        check_count("val_size", self.val_size)
        check_count("clutter", self.clutter, at_least=0)
        check_count("split_seed", self.split_seed, at_least=0)
        if not _MIN_SIDE <= self.img_size <= _MAX_SIDE:
            raise ValueError(
                f"img_size must lie in [{_MIN_SIDE}, {_MAX_SIDE}], got {self.img_size}."
            )
        if not 0 < self.min_share <= self.max_share <= _MAX_SHARE:
            raise ValueError(
                f"min_share and max_share must lie in (0, {_MAX_SHARE}], the first not above the "
                f"second, got {self.min_share} and {self.max_share}."
            )
        if self.backgrounds == []:
            raise ValueError("backgrounds must name at least one file or folder, got [].")

    def build(self, seed: int) -> Splits:
        """Read objects and photographs into memory; pictures are composed on request.

        Picture i of a part depends on (seed, part, i) only, and is the same for both tasks.

        Raises:
            ValueError: If a package is missing, a file cannot be read, or there are too few
                objects or photographs.
        """
        classes, parts = self._deal()
        sizes = {"training": self.train_size, "validation": self.val_size, "test": self.val_size}
        make = StampCategorySet if self.task == "category" else StampMaskSet
        train, val = (
            make(
                StampPictures(
                    parts[part],
                    num_pictures=sizes[part],
                    seed=(seed, PARTS.index(part)),
                    img_size=self.img_size,
                    share=(self.min_share, self.max_share),
                    clutter=self.clutter,
                )
            )
            for part in ("training", "validation" if self.val == "val" else "test")
        )
        if self.task == "mask":
            return Splits(train=train, val=val, classes=("object",), dense=True)
        return Splits(train=train, val=val, classes=classes)

    def _deal(self) -> tuple[tuple[str, ...], dict[str, "StampPart"]]:
        """Return the names of the classes, and the objects and photographs by part."""
        cutouts = _load_cutouts(self.stamps, self.img_size)
        paths = BACKGROUNDS if self.backgrounds is None else tuple(map(Path, self.backgrounds))
        backgrounds = _load_backgrounds(paths, self.img_size)
        class_of = classes_by_folder([cutout.name for cutout in cutouts], MIN_OBJECTS)
        classes = tuple(sorted(set(class_of.values())))
        if len(classes) < 2:
            raise ValueError(
                f"data.stamps: {self.stamps} must have at least 2 folders of {MIN_OBJECTS} or more "
                f"photographed objects, got {len(classes)}."
            )
        members = [
            [cutout for cutout in cutouts if class_of.get(cutout.name) == name] for name in classes
        ]
        others = [cutout for cutout in cutouts if cutout.name not in class_of]
        rng = np.random.default_rng(self.split_seed)
        by_class = [
            _deal_at_random(of_class, f"data.stamps, objects of {name}", rng)
            for name, of_class in zip(classes, members, strict=True)
        ]
        grounds = _deal_at_random(backgrounds, "data.backgrounds, photographs", rng)
        clutter: dict[str, list[Cutout]] = {part: [] for part in PARTS}
        if self.clutter:
            clutter = _deal_at_random(others, "data.clutter, objects of no class", rng)
        return classes, {
            part: StampPart(
                by_class=[dealt[part] for dealt in by_class],
                others=clutter[part],
                backgrounds=grounds[part],
            )
            for part in PARTS
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StampPart:
    """Objects and photographs of one part."""

    by_class: list[list[Cutout]]
    """Objects of each class."""
    others: list[Cutout]
    """Objects of no class."""
    backgrounds: list[Background]
    """Photographs for the background."""


class StampPicture(NamedTuple):
    """A composed picture."""

    image: Image.Image
    """The picture, RGB."""
    label: int
    """Class index of its object."""
    mask: np.ndarray
    """Pixels of all its objects: [H, W] uint8 of 0 and 1."""
    name: str
    """Name of the object of the class, such as animals/birds/owl."""


class StampPictures:
    """Pictures of a part, each composed when it is requested."""

    def __init__(
        self,
        part: StampPart,
        *,
        num_pictures: int,
        seed: tuple[int, ...],
        img_size: int,
        share: tuple[float, float],
        clutter: int,
    ) -> None:
        """Hold the settings.

        Args:
            part: Objects and photographs to draw from.
            num_pictures: Number of pictures.
            seed: Seed of the part; together with the index of a picture it seeds that picture.
            img_size: Side of a picture in pixels.
            share: Least and largest fraction of the picture that an object covers.
            clutter: Number of objects of no class in each picture.
        """
        self.part, self.num_pictures, self.seed = part, num_pictures, seed
        self.img_size, self.share, self.clutter = img_size, share, clutter

    def __len__(self) -> int:
        return self.num_pictures

    def label(self, index: int) -> int:
        """Return the class of the object in picture `index`."""
        return self._draw_label(self._rng(index))

    def compose(self, index: int) -> StampPicture:
        """Compose picture `index`. The object of the class is drawn last, so nothing covers it."""
        rng = self._rng(index)
        label = self._draw_label(rng)
        scene = crop_photograph(self.part.backgrounds, self.img_size, rng)
        mask = np.zeros((self.img_size, self.img_size), np.uint8)
        for cutouts in (*[self.part.others] * self.clutter, self.part.by_class[label]):
            cutout, sprite = random_sprite(cutouts, self.img_size, self.share, rng)
            paste_sprite(scene, mask, sprite, freest_place(sprite, mask, rng), 1)
        return StampPicture(scene, label, mask, cutout.name)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num_pictures:
            raise IndexError(index)
        return np.random.default_rng((*self.seed, index))

    def _draw_label(self, rng: np.random.Generator) -> int:
        # Drawn first, so that labels are known without composing pictures.
        return int(rng.integers(len(self.part.by_class)))


class StampCategorySet(Dataset[tuple[Image.Image, int]]):
    """Pictures with the class of their object."""

    def __init__(self, pictures: StampPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        picture = self.pictures.compose(index)
        return picture.image, picture.label

    @property
    def labels(self) -> list[int]:
        """Class indices in the order of the pictures."""
        return [self.pictures.label(index) for index in range(len(self))]


class StampMaskSet(Dataset[tuple[Image.Image, np.ndarray]]):
    """Pictures with the mask of all their objects."""

    def __init__(self, pictures: StampPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        picture = self.pictures.compose(index)
        return picture.image, picture.mask


def _deal_at_random(items: Sequence[T], what: str, rng: np.random.Generator) -> dict[str, list[T]]:
    order = rng.permutation(len(items))
    shuffled = [items[number] for number in order]
    return deal(shuffled, what, val_every=_VAL_EVERY, test_every=_TEST_EVERY)


@lru_cache(maxsize=2)
def _load_cutouts(folder: str, size: int) -> tuple[Cutout, ...]:
    return tuple(load_cutouts(Path(folder), size, setting="data.stamps"))


@lru_cache(maxsize=2)
def _load_backgrounds(paths: tuple[Path, ...], size: int) -> tuple[Background, ...]:
    return tuple(load_backgrounds(paths, size, setting="data.backgrounds"))
