"""Images and masks in two folders, paired by their names, as in ADE20K and similar data sets."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from tokendial.data.readers.binary_masks import (
    MaskReading,
    MaskRule,
    find_reading,
    read_binary_mask,
)
from tokendial.data.readers.class_masks import Palette, palette_colours, read_class_mask
from tokendial.data.readers.colour_codes import Colour
from tokendial.data.readers.files import PATH, format_more, format_path, warn_of_other_files
from tokendial.data.readers.images import (
    ImageError,
    count_pictures,
    list_images,
    read_image,
    upright_size,
    warn_of_multi_picture_files,
)
from tokendial.data.readers.lists import read_lines
from tokendial.data.readers.pixels import (
    ValueRange,
    check_range,
    sample_files,
    warn_of_unused_range,
)
from tokendial.data.sets.labelled_images import Broken, check_broken
from tokendial.data.splits import Splits
from tokendial.methods import register

_LOG = logging.getLogger(__name__)


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    """Image file."""
    mask: Path
    """Mask file."""
    read_mask: Callable[[Path], np.ndarray]
    """Function that reads the mask as [H, W] uint8."""


@register("data", "pairs")
@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """`root/images/SPLIT/NAME.jpg` and `root/annotations/SPLIT/NAME.png`, one root or several."""

    root: str | list[str] = field(metadata=PATH)
    """Folder that holds the folders of images and masks; or a list of such folders, whose pairs are
    joined."""
    classes: int | list[str] | None = None
    """Number of classes, or their names, for semantic segmentation. null: masks are binary."""
    ignore_zero: bool = False
    """Whether value 0 of a mask is ignored and value 1 is the first class, as in ADE20K. Value 255
    is always ignored in masks of classes."""
    train: str = "training"
    """Name of the training folder, below the folders of images and of masks."""
    val: str = "validation"
    """Name of the validation folder, below the folders of images and of masks."""
    images: str = "images"
    """Name of the folder of images."""
    annotations: str = "annotations"
    """Name of the folder of masks."""
    lists: str | None = None
    """Folder below the root with a file TRAIN.txt and a file VAL.txt, where TRAIN and VAL are the
    values of `train` and `val`. Each line is the name of a pair, as in PASCAL VOC. Images and masks
    then lie in their folders without a folder for each split. null: there are no lists."""
    image_suffix: str = ""
    """End of an image's name, before the file ending, that its mask does not have, such as
    _leftImg8bit in Cityscapes. Images without it are left out."""
    mask_suffix: str = ""
    """End of a mask's name, before the file ending, that its image does not have, such as
    _gtFine_labelTrainIds in Cityscapes. Masks without it are left out."""
    mask: MaskRule = "auto"
    """Pixels of a binary mask that are inside. auto: found from the files, one rule for all of a
    root; alpha: those that are not transparent; half: those brighter than half of the full range;
    nonzero: those that are not 0 (black); a list: those with one of these values or colours, such
    as [1] or [[255, 0, 0]]. In files with a palette a value is a palette index."""
    ignore: int | Colour | None = None
    """Value or colour of mask pixels that are ignored, such as 255 or [224, 224, 192]. In files
    with a palette a value is a palette index. null: nothing is ignored, except 255 in masks of
    classes."""
    palette: Palette | None = None
    """Colours of the class values 0, 1, ... if masks are stored in colours. voc: the 21 classes of
    PASCAL VOC; cityscapes: the 19 of Cityscapes, each with the colours that these data sets ignore.
    null: masks store the class values."""
    range: ValueRange = None
    """Values that become black and white in grey images of more than 8 bits, such as [0, 4095].
    image: the smallest and largest value of each image; null: the limits of the file's number
    type."""
    broken: Broken = "error"
    """What to do with broken pairs: a file without a partner, sizes that differ, or a file that
    cannot be read. error: stop before the run if file names or file headers show one; pixel data
    are not decoded then, so a damaged image stops the run when it is read (`tokendial data check`
    decodes all). skip: decode every file before the run, log each broken pair and leave it out."""

    def __post_init__(self) -> None:
        check_broken(self.broken)
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"classes must be at least 2, or null, got {self.classes!r}.")
        if self.classes is None and self.ignore_zero:
            raise ValueError("ignore_zero must be false for binary masks, got true.")
        if not self.roots():
            raise ValueError("root must name at least one folder, got [].")
        self._check_mask_settings()
        check_range(self.range)

    def _check_mask_settings(self) -> None:
        if self.num_classes is None:
            if self.palette is not None:
                raise ValueError(
                    "palette is for masks of classes, but classes is null; for binary masks set "
                    "mask."
                )
        elif self.mask != "auto":
            raise ValueError(
                f"mask is for binary masks, but classes are given: mask must be auto, "
                f"got {self.mask!r}."
            )
        if not self.mask:
            raise ValueError("mask must name at least one value, got [].")
        if self.num_classes is not None and self.palette is not None:
            expected = self.num_classes + int(self.ignore_zero)
            if (got := len(palette_colours(self.palette)[0])) != expected:
                zero = " and one for value 0, which is ignored" if self.ignore_zero else ""
                raise ValueError(
                    f"palette must have {expected} colours (one for each class{zero}), got {got}."
                )
        values = self.mask if isinstance(self.mask, list) else []
        for colour in (*values, self.ignore, *(self.palette or ())):
            if isinstance(colour, tuple) and not all(0 <= value <= 255 for value in colour):
                raise ValueError(f"colours must lie in [0, 255], got {list(colour)}.")

    def roots(self) -> list[Path]:
        """Return the root folders."""
        return [Path(root) for root in ([self.root] if isinstance(self.root, str) else self.root)]

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for binary masks."""
        return len(self.classes) if isinstance(self.classes, list) else self.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; binary masks have a single one."""
        if self.classes is None:
            return ("mask",)
        if isinstance(self.classes, int):
            return tuple(f"class {number}" for number in range(self.classes))
        return tuple(self.classes)

    def build(self, seed: int) -> Splits:
        """List the pairs and check them as `broken` says.

        Raises:
            ValueError: If a folder is missing or empty, a pair is broken and `broken` is "error",
                binary masks can be read in several ways, or images need `range` and it is null.
        """
        train: list[Pair] = []
        val: list[Pair] = []
        for root in self.roots():
            listed = [self._list_pairs(root, split) for split in (self.train, self.val)]
            # One reading for both splits, so that they cannot differ.
            masks = [mask for pairs, _ in listed for _, mask in pairs]
            read_mask = self.mask_reader(self.mask_reading(root, masks))
            for part, (pairs, problems) in zip((train, val), listed, strict=True):
                part += self._drop_broken(
                    root, [Pair(*pair, read_mask) for pair in pairs], problems
                )
        for part, split in ((train, self.train), (val, self.val)):
            if not part:
                raise self._no_pairs(split)
        warn_of_unused_range(sample_files(pair.image for pair in train), self.range, self.root)
        return Splits(
            train=PairSet(train, self.range),
            val=PairSet(val, self.range),
            classes=self.class_names,
            dense=True,
        )

    def val_set(self) -> "PairSet":
        """Return the validation pairs alone; the training pairs need not exist.

        Raises:
            ValueError: If `build` would raise one because of the validation pairs.
        """
        found: list[Pair] = []
        for root in self.roots():
            pairs, problems = self._list_pairs(root, self.val)
            read_mask = self.mask_reader(self.mask_reading(root, [mask for _, mask in pairs]))
            found += self._drop_broken(root, [Pair(*pair, read_mask) for pair in pairs], problems)
        if not found:
            raise self._no_pairs(self.val)
        return PairSet(found, self.range)

    def _no_pairs(self, split: str) -> ValueError:
        roots = ", ".join(map(str, self.roots()))
        return ValueError(f"data: no pairs of an image and a mask for {split} in {roots}.")

    def pairs(
        self, root: Path, split: str, other_suffixes: Counter[str] | None = None
    ) -> tuple[list[tuple[Path, Path]], list[str]]:
        """Return the (image, mask) files of a split, and one line for each file that has no pair.

        Args:
            root: One of the root folders.
            split: Name of the training or the validation folder.
            other_suffixes: Counter to which the endings of files that are no images are added.

        Raises:
            ValueError: If a folder or a list is missing.
        """
        images, masks = (
            _images_by_name(root / folder / ("" if self.lists else split), suffix, other_suffixes)
            for folder, suffix in (
                (self.images, self.image_suffix),
                (self.annotations, self.mask_suffix),
            )
        )
        if self.lists is not None:
            listed = dict.fromkeys(_read_list(root / self.lists / f"{split}.txt"))
            missing = [name for name in listed if name not in images and name not in masks]
            images = {name: images[name] for name in listed if name in images}
            masks = {name: masks[name] for name in listed if name in masks}
        else:
            missing = []
        problems = [f"{name} of {split}.txt has neither image nor mask" for name in missing]
        problems += [f"{p} has no mask" for n in images if n not in masks for p in images[n]]
        problems += [f"{p} has no image" for n in masks if n not in images for p in masks[n]]
        pairs = []
        for name in (name for name in images if name in masks):
            if several := [files for files in (images[name], masks[name]) if len(files) > 1]:
                problems += [f"{' and '.join(map(str, files))} have one name" for files in several]
            else:
                pairs.append((images[name][0], masks[name][0]))
        return pairs, sorted(problems)

    def mask_reading(self, root: Path, masks: Sequence[Path]) -> MaskReading | None:
        """Return how the binary masks of a root are read; None for masks of classes.

        Raises:
            ValueError: If they can be read in several ways.
        """
        if self.num_classes is not None:
            return None
        reading = find_reading(self.mask, masks, self.ignore, root)
        if masks and reading.rule == ():
            _LOG.warning("data: all masks in %s are empty", root)
        return reading

    def mask_reader(self, reading: MaskReading | None) -> Callable[[Path], np.ndarray]:
        """Return the function that reads a mask file; `reading` is None for masks of classes."""
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

    def _list_pairs(self, root: Path, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
        """Do what `pairs` does, and log the files that are no images."""
        other_suffixes: Counter[str] = Counter()
        found = self.pairs(root, split, other_suffixes)
        warn_of_other_files(other_suffixes, "image", f"{root}, {split}")
        return found

    def _drop_broken(self, root: Path, pairs: list[Pair], problems: list[str]) -> list[Pair]:
        """Return the pairs that are not broken; raise for the others if `broken` is "error"."""
        by_pair = self._find_problems(pairs)
        problems = problems + [problem for problem in by_pair if problem]
        if problems and self.broken == "error":
            raise ValueError(
                f"data: {problems[0]}{format_more(len(problems) - 1, 'problem')}; "
                f"`tokendial data check {root}` lists all, data.broken=skip leaves such pairs out."
            )
        for problem in problems:
            _LOG.warning("left out: %s", problem)
        intact = [pair for pair, problem in zip(pairs, by_pair, strict=True) if problem is None]
        warn_of_multi_picture_files(
            (path, count_pictures(path)) for pair in intact for path in (pair.image, pair.mask)
        )
        return intact

    def _find_problems(self, pairs: Sequence[Pair]) -> list[str | None]:
        """Return one line for each broken pair and None for each other one."""
        if self.broken == "error":
            return [header_problem(pair.image, pair.mask) for pair in pairs]
        pair_set = PairSet(pairs, self.range)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(pair_set.problem, range(len(pairs))))


class PairSet(Dataset[tuple[Image.Image, np.ndarray]]):
    """Images and their masks, each pair read when it is requested."""

    def __init__(self, pairs: Sequence[Pair], value_range: ValueRange = None) -> None:
        self.pairs, self.value_range = list(pairs), value_range

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image and its mask [H, W] uint8: 0 and 1 or class indices, and `IGNORED`."""
        pair = self.pairs[index]
        image, mask = read_image(pair.image, self.value_range), pair.read_mask(pair.mask)
        if mask.shape != image.size[::-1]:
            raise ImageError(f"{_size_problem(*pair[:2], image.size, mask.shape[::-1])}.")
        return image, mask

    def problem(self, index: int) -> str | None:
        """Return one line if pair `index` cannot be read, else None."""
        try:
            self[index]
        except ImageError as error:
            return str(error).rstrip(".")
        return None


def header_problem(image: Path, mask: Path) -> str | None:
    """Return one line if the sizes of a pair differ or a file is no image; reads headers only."""
    sizes = []
    for path in (image, mask):
        try:
            sizes.append(upright_size(path))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            return f"{path} is not an image"
    return None if sizes[0] == sizes[1] else _size_problem(image, mask, *sizes)


def _size_problem(
    image: Path, mask: Path, image_size: tuple[int, int], mask_size: tuple[int, ...]
) -> str:
    (width, height), (mask_width, mask_height) = image_size, mask_size
    return f"{image} has {width} x {height} pixels, but {mask} has {mask_width} x {mask_height}"


def _read_list(path: Path) -> list[str]:
    """Return the names in a list of images, in Unicode's form NFC."""
    lines = read_lines(path, "data.lists names the folder that holds it.")
    return [unicodedata.normalize("NFC", line) for _, line in lines]


def _images_by_name(
    folder: Path, suffix: str, other_suffixes: Counter[str] | None
) -> dict[str, list[Path]]:
    """Return the images below a folder by their path in it, without ending, in Unicode's form NFC.

    File systems store the same name in different Unicode forms.

    Args:
        folder: Folder to search recursively.
        suffix: End of the names before the file ending. It is removed; names without it are left
            out.
        other_suffixes: Counter to which the endings of files that are no images are added.

    Raises:
        ValueError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"data: no such folder: {format_path(folder)}.")
    found: dict[str, list[Path]] = {}
    for path in list_images(folder, other_suffixes):
        name = str(path.relative_to(folder).with_suffix(""))
        if not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        found.setdefault(unicodedata.normalize("NFC", name), []).append(path)
    return found
