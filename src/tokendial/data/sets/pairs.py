"""Images and masks in two folders, paired by their names: ADE20K's layout and what is like it."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from tokendial.data.readers.files import PATH, shown, warn_of_others
from tokendial.data.readers.images import (
    ImageError,
    count_pictures,
    images_in,
    read_image,
    warn_of_several,
)
from tokendial.data.readers.masks import (
    IGNORED,
    Colour,
    MaskRule,
    Palette,
    Reading,
    look_at,
    palette_colours,
    read_binary_mask,
    read_class_mask,
    reading_of,
)
from tokendial.data.readers.pixels import ValueRange, check_range, named, warn_of_unused_range
from tokendial.data.splits import Splits
from tokendial.methods import register

_SWAPPED = (5, 6, 7, 8)  # orientations of EXIF that exchange height and width
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF
_MANY_VALUES = 12
_LOG = logging.getLogger(__name__)


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    """File of the image."""
    mask: Path
    """File of the mask."""
    read: Callable[[Path], np.ndarray]
    """Reads the mask as masks of its root are read."""


@register("data", "pairs")
@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """`root/images/SPLIT/NAME.jpg` and `root/annotations/SPLIT/NAME.png`, one root or several."""

    root: str | list[str] = field(metadata=PATH)
    """Folder that holds images and annotations, or several, whose pairs are joined."""
    classes: int | list[str] | None = None
    """Number or names of the classes of a semantic segmentation; null: binary masks."""
    ignore_zero: bool = False
    """Whether value 0 of a mask is ignored and 1 is the first class, as in ADE20K; value 255 is
    ignored in any case."""
    train: str = "training"
    """Name of the training folders."""
    val: str = "validation"
    """Name of the validation folders."""
    images: str = "images"
    """Name of the folder of images."""
    annotations: str = "annotations"
    """Name of the folder of masks."""
    mask: MaskRule = "auto"
    """What is inside a binary mask. auto: as the files tell, the same for all of a root; alpha:
    what is not transparent; half: what is brighter than half of the full range; nonzero: all that
    is not 0 (black); a list of values (of palettes: indices) or colours: these, such as [1] or
    [[255, 0, 0]]."""
    ignore: int | Colour | None = None
    """Value (of palettes: the index) or colour of a mask where nothing is asked, such as 255 or
    [224, 224, 192]; null: none, but for 255 in masks of classes."""
    palette: Palette | None = None
    """Colours of the values 0, 1, ... of masks of classes; voc, cityscapes: those of PASCAL VOC's
    21 classes and Cityscapes' 19, with what these ignore; null: masks hold the values."""
    range: ValueRange = None
    """What is black and white in images of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""
    broken: Literal["error", "skip"] = "error"
    """What to do about files without a partner, pairs of different sizes and files that cannot be
    read. error: stop, if names, headers or sizes tell of one; skip: read every file before the run
    begins, report the broken ones and leave them out."""

    def __post_init__(self) -> None:
        if self.broken not in ("error", "skip"):
            raise ValueError(f"broken must be one of error, skip, got {self.broken!r}.")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"classes must be at least 2, or null, got {self.classes!r}.")
        if self.classes is None and self.ignore_zero:
            raise ValueError("ignore_zero must be false for binary masks, got true.")
        if not self.roots():
            raise ValueError("root must name at least one folder, got [].")
        self._check_masks()
        check_range(self.range)

    def _check_masks(self) -> None:
        if self.num_classes is None:
            if self.palette is not None:
                raise ValueError("palette is for classes, but classes is null: see mask.")
        elif self.mask != "auto":
            raise ValueError(f"mask is for binary masks, but there are classes, got {self.mask!r}.")
        if not self.mask:
            raise ValueError("mask must name at least one value, got [].")
        if self.num_classes is not None and self.palette is not None:
            wanted = self.num_classes + int(self.ignore_zero)
            if (got := len(palette_colours(self.palette)[0])) != wanted:
                raise ValueError(
                    f"palette must have {wanted} colours (classes and ignore_zero), got {got}."
                )
        listed = self.mask if isinstance(self.mask, list) else []
        for colour in (*listed, self.ignore, *(self.palette or ())):
            if isinstance(colour, tuple) and not all(0 <= value <= 255 for value in colour):
                raise ValueError(f"colours must lie in [0, 255], got {list(colour)}.")

    def roots(self) -> list[Path]:
        """The folders."""
        return [Path(root) for root in ([self.root] if isinstance(self.root, str) else self.root)]

    @property
    def num_classes(self) -> int | None:
        """Of a semantic segmentation; None: binary masks."""
        return len(self.classes) if isinstance(self.classes, list) else self.classes

    def build(self, seed: int) -> Splits:
        """List the pairs.

        Raises:
            ValueError: If a folder is missing or empty, a pair is broken and `broken` does not say
                to skip it, binary masks can be read in several ways, or nothing says what is black
                and white.
        """
        classes = self.classes
        if classes is None:
            names: tuple[str, ...] = ("mask",)
        elif isinstance(classes, int):
            names = tuple(f"class {number}" for number in range(classes))
        else:
            names = tuple(classes)
        of_train: list[Pair] = []
        of_val: list[Pair] = []
        for root in self.roots():
            listed = [self._listed(root, split) for split in (self.train, self.val)]
            read = self.reader(
                self.reading(root, [mask for pairs, _ in listed for _, mask in pairs])
            )
            for found, (pairs, problems) in zip((of_train, of_val), listed, strict=True):
                found += self._whole(root, [Pair(*pair, read) for pair in pairs], problems)
        for found, split in ((of_train, self.train), (of_val, self.val)):
            if not found:
                roots = ", ".join(map(str, self.roots()))
                raise ValueError(f"data: no pairs of an image and a mask for {split} in {roots}.")
        warn_of_unused_range(named(pair.image for pair in of_train), self.range, self.root)
        train, val = (PairSet(found, self.range) for found in (of_train, of_val))
        return Splits(train=train, val=val, classes=names, dense=True)

    def _listed(self, root: Path, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
        """As `pairs`; files of other kinds are told of in a warning."""
        others: Counter[str] = Counter()
        found = self.pairs(root, split, others)
        warn_of_others(others, "image", f"{root}, {split}")
        return found

    def _whole(self, root: Path, pairs: list[Pair], problems: list[str]) -> list[Pair]:
        """The pairs of a root that are not broken."""
        of_pairs = self._problems(pairs)
        problems = problems + [problem for problem in of_pairs if problem]
        if problems and self.broken == "error":
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise ValueError(
                f"data: {problems[0]}{more}; `tokendial data check {root}` lists them, "
                "data.broken=skip leaves such pairs out."
            )
        for problem in problems:
            _LOG.warning("left out: %s", problem)
        kept = [pair for pair, bad in zip(pairs, of_pairs, strict=True) if bad is None]
        warn_of_several(
            (path, count_pictures(path)) for pair in kept for path in (pair.image, pair.mask)
        )
        return kept

    def reading(self, root: Path, masks: Sequence[Path]) -> Reading | None:
        """How the masks of a root are read if they are binary; None: they are not.

        Raises:
            ValueError: If they can be read in several ways.
        """
        if self.num_classes is not None:
            return None
        reading = reading_of(self.mask, masks, self.ignore, root)
        if masks and reading.rule == ():
            _LOG.warning("data: all masks in %s are empty", root)
        return reading

    def reader(self, reading: Reading | None) -> Callable[[Path], np.ndarray]:
        """What reads masks, as `PairSet` gives them."""
        if reading is not None:
            return partial(read_binary_mask, reading=reading, ignore=self.ignore)
        assert self.num_classes is not None
        return partial(
            read_class_mask,
            num_classes=self.num_classes,
            ignore_zero=self.ignore_zero,
            ignore=self.ignore,
            palette=self.palette,
        )

    def _problems(self, pairs: Sequence[Pair]) -> list[str | None]:
        """One line for each pair that is broken."""
        if self.broken == "error":
            return [header_problem(pair.image, pair.mask) for pair in pairs]
        reader = PairSet(pairs, self.range)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(reader.problem, range(len(pairs))))

    def pairs(
        self, root: Path, split: str, others: Counter[str] | None = None
    ) -> tuple[list[tuple[Path, Path]], list[str]]:
        """Pairs of files of a split, and one line about each file that has not just one partner.

        Args:
            root: One of the folders.
            split: Name of the training or the validation folders.
            others: Endings of files that are no images are counted here.

        Raises:
            ValueError: If a folder is missing.
        """
        images, masks = (
            _by_name(root / name / split, others) for name in (self.images, self.annotations)
        )
        problems = [f"{p} has no mask" for n in images if n not in masks for p in images[n]]
        problems += [f"{p} has no image" for n in masks if n not in images for p in masks[n]]
        pairs = []
        for name in (name for name in images if name in masks):
            if several := [side for side in (images[name], masks[name]) if len(side) > 1]:
                problems += [f"{' and '.join(map(str, side))} have one name" for side in several]
            else:
                pairs.append((images[name][0], masks[name][0]))
        return pairs, sorted(problems)


def _by_name(folder: Path, others: Counter[str] | None) -> dict[str, list[Path]]:
    """Images below a folder by their names without endings, which file systems write differently.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"data: no such folder: {shown(folder)}.")
    found: dict[str, list[Path]] = {}
    for path in images_in(folder, others):
        name = str(path.relative_to(folder).with_suffix(""))
        found.setdefault(unicodedata.normalize("NFC", name), []).append(path)
    return found


class PairSet(Dataset[tuple[Image.Image, np.ndarray]]):
    """Reads pair `i` when it is asked for."""

    def __init__(self, pairs: Sequence[Pair], value_range: ValueRange = None) -> None:
        self.pairs, self.value_range = list(pairs), value_range

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image, and its mask [H, W] uint8: 0 or 1, or class indices, and `IGNORED`."""
        pair = self.pairs[index]
        image, mask = read_image(pair.image, self.value_range), pair.read(pair.mask)
        if mask.shape != image.size[::-1]:
            raise ImageError(f"{size_line(pair.image, image.size, pair.mask, mask.shape[::-1])}.")
        return image, mask

    def problem(self, index: int) -> str | None:
        """One line if pair `index` cannot be read."""
        try:
            self[index]
        except ImageError as error:
            return str(error).rstrip(".")
        return None


@dataclass(slots=True)
class Inside:
    """How much of the masks of a split is inside."""

    split: str
    """Name of the folder."""
    masks: int = 0
    """Masks that could be read."""
    empty: int = 0
    """Masks with nothing inside."""
    full: int = 0
    """Masks with nothing outside."""
    pixels: int = 0
    """Pixels that count."""
    inside: int = 0
    """Pixels that are inside."""

    def add(self, mask: np.ndarray) -> None:
        """Take in a mask of 0, 1 and `IGNORED`."""
        inside, pixels = int((mask == 1).sum()), int((mask != IGNORED).sum())
        self.masks += 1
        self.inside += inside
        self.pixels += pixels
        self.empty += inside == 0
        self.full += inside == pixels > 0

    def __str__(self) -> str:
        return (
            f"{self.split}: {self.inside / max(1, self.pixels):.1%} of the pixels are inside; of "
            f"{self.masks} masks {self.empty} are empty and {self.full} full"
        )


def check_pairs(data: Pairs, root: Path, told: list[str] | None = None) -> Iterator[str]:
    """One line about everything that is wrong with a root, every file read.

    Args:
        data: How it is read.
        root: One of its folders.
        told: Where to add how binary masks are read, and how much of each split is inside.

    Yields:
        Files without a partner, pairs of different sizes, files that cannot be read, masks with
        values that are no classes, binary masks that can be read in several ways or have odd
        values, splits of which all masks are empty or full, and images of which nothing says what
        is black and white.

    Raises:
        ValueError: If a folder is missing.
    """
    listed = {split: data.pairs(root, split) for split in (data.train, data.val)}
    for _, problems in listed.values():
        yield from problems
    told = [] if told is None else told
    try:
        reading = data.reading(root, [mask for pairs, _ in listed.values() for _, mask in pairs])
        images = (image for pairs, _ in listed.values() for image, _ in pairs)
        warn_of_unused_range(named(images), data.range, root)
    except ValueError as error:
        yield str(error).rstrip(".")
        return
    if reading is not None:
        told.append(f"inside is {reading}")
    for split, (pairs, _) in listed.items():
        reader = PairSet([Pair(*pair, data.reader(reading)) for pair in pairs], data.range)
        inside = Inside(split)
        for number, (_, path) in enumerate(pairs):
            try:
                _, mask = reader[number]
            except ImageError as error:
                yield str(error).rstrip(".")
                continue
            if reading is not None:
                inside.add(mask)
                if data.mask == "auto" and reading.rule == "half" and (odd := _odd_values(path)):
                    yield odd
        if reading is not None:
            told.append(str(inside))
            for count, what in ((inside.empty, "empty"), (inside.full, "full")):
                if count and count == inside.masks:
                    yield f"{root / data.annotations / split}: all masks are {what}"


def _odd_values(path: Path) -> str | None:
    """What is odd about the values of a binary mask that no lossy format has changed."""
    look = look_at(path)
    if look.lossy or len(look.codes) <= 2:
        return None
    shown = ", ".join(map(str, sorted(look.codes)[:_MANY_VALUES]))
    more = ", ..." if len(look.codes) > _MANY_VALUES else ""
    return f"{path} is not binary: it has {len(look.codes)} values ({shown}{more})"


def header_problem(image: Path, mask: Path) -> str | None:
    """One line if a pair differs in size or is no image; reads headers only."""
    sizes = []
    for path in (image, mask):
        try:
            sizes.append(_upright_size(path))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            return f"{path} is not an image"
    return None if sizes[0] == sizes[1] else size_line(image, sizes[0], mask, sizes[1])


def size_line(
    image: Path, image_size: tuple[int, int], mask: Path, mask_size: tuple[int, ...]
) -> str:
    """One line about a pair that differs in size."""
    (width, height), (mask_width, mask_height) = image_size, mask_size
    return f"{image} has {width} x {height} pixels, but {mask} has {mask_width} x {mask_height}"


def _upright_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        size = image.size
        turned = image.getexif().get(_ORIENTATION) in _SWAPPED
        tags = getattr(image, "tag_v2", None)
        # Of TIFF files, newer releases of Pillow give the upright size themselves.
        if tags is not None and size != (tags[_WIDTH], tags[_HEIGHT]):
            return size
        return size[::-1] if turned else size
