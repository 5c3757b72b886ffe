"""Images and masks in two folders, paired by their names: ADE20K's layout and what is like it."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from tokendial.data.files import PATH, shown, warn_of_others
from tokendial.data.images import (
    ImageError,
    count_pictures,
    images_in,
    read_image,
    warn_of_several,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

IGNORED = 255
"""Value of a mask where nothing is asked."""
_SWAPPED = (5, 6, 7, 8)  # orientations of EXIF that exchange height and width
_ORIENTATION = 0x0112
_MANY_VALUES = 12
_LOG = logging.getLogger(__name__)


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
            ValueError: If a folder is missing or empty, or a pair is broken and `broken` does not
                say to skip it.
        """
        classes = self.classes
        if classes is None:
            names: tuple[str, ...] = ("mask",)
        elif isinstance(classes, int):
            names = tuple(f"class {number}" for number in range(classes))
        else:
            names = tuple(classes)
        train, val = (self._set(split) for split in (self.train, self.val))
        return Splits(train=train, val=val, classes=names, dense=True)

    def _set(self, split: str) -> "PairSet":
        found: list[tuple[Path, Path]] = []
        for root in self.roots():
            others: Counter[str] = Counter()
            pairs, problems = self.pairs(root, split, others)
            warn_of_others(others, "image", f"{root}, {split}")
            of_pairs = self._problems(pairs)
            problems += filter(None, of_pairs)
            if problems and self.broken == "error":
                more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
                raise ValueError(
                    f"data: {problems[0]}{more}; `tokendial data check {root}` lists them, "
                    "data.broken=skip leaves such pairs out."
                )
            for problem in problems:
                _LOG.warning("left out: %s", problem)
            found += [pair for pair, bad in zip(pairs, of_pairs, strict=True) if bad is None]
        if not found:
            roots = ", ".join(map(str, self.roots()))
            raise ValueError(f"data: no pairs of an image and a mask for {split} in {roots}.")
        warn_of_several((path, count_pictures(path)) for pair in found for path in pair)
        return self.reader(found)

    def reader(self, pairs: Sequence[tuple[Path, Path]]) -> "PairSet":
        """Reads pairs as the settings say."""
        return PairSet(pairs, self.num_classes, ignore_zero=self.ignore_zero)

    def _problems(self, pairs: Sequence[tuple[Path, Path]]) -> list[str | None]:
        """One line for each pair that is broken."""
        if self.broken == "error":
            return [header_problem(*pair) for pair in pairs]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.reader(pairs).problem, range(len(pairs))))

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

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], num_classes: int | None, *, ignore_zero: bool
    ) -> None:
        self.pairs, self.num_classes, self.ignore_zero = list(pairs), num_classes, ignore_zero

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image, and its mask [H, W] uint8: 0 or 1, or class indices and `IGNORED`."""
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path)
        if self.num_classes is None:
            mask = read_binary_mask(mask_path)
        else:
            mask = read_class_mask(mask_path, self.num_classes, ignore_zero=self.ignore_zero)
        if mask.shape != image.size[::-1]:
            raise ImageError(f"{size_line(image_path, image.size, mask_path, mask.shape[::-1])}.")
        return image, mask

    def problem(self, index: int) -> str | None:
        """One line if pair `index` cannot be read."""
        try:
            self[index]
        except ImageError as error:
            return str(error).rstrip(".")
        return None


def read_binary_mask(path: Path) -> np.ndarray:
    """Read a binary mask as [H, W] uint8 of 0 and 1.

    Palette images: every index but 0 is inside. Otherwise the grey level decides: masks of 0 and 1
    as they are, others by half of their full range, so that the noise around the borders of a JPEG
    does not count.

    Raises:
        ImageError: If the file cannot be read.
    """
    image = _open(path)
    if image.mode == "P":
        return (np.asarray(image) > 0).astype(np.uint8)
    grey = np.asarray(image if image.mode in ("1", "L", "I", "I;16") else image.convert("L"))
    top = int(grey.max(initial=0))
    half = 0 if top <= 1 else 127 if top <= 255 else 32767
    return (grey > half).astype(np.uint8)


def read_class_mask(path: Path, num_classes: int, *, ignore_zero: bool) -> np.ndarray:
    """Read a mask of class indices as [H, W] uint8; `IGNORED` where nothing is asked.

    Raises:
        ImageError: If the file cannot be read, holds no indices, or one beyond the classes.
    """
    values = _indices(path)
    first = int(ignore_zero)
    ignored = (values == IGNORED) | (ignore_zero & (values == 0))
    outside = values[~ignored & ((values < first) | (values >= num_classes + first))]
    if outside.size:
        raise ImageError(
            f"{path} has the value {outside[0]}, but classes are {first} to "
            f"{num_classes + first - 1} and {IGNORED} is ignored."
        )
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)


def check_pairs(data: Pairs, root: Path) -> Iterator[str]:
    """One line about everything that is wrong with a root, every file read.

    Yields:
        Files without a partner, pairs of different sizes, files that cannot be read, masks with
        values that are no classes, and binary masks with odd values.

    Raises:
        ValueError: If a folder is missing.
    """
    for split in (data.train, data.val):
        pairs, problems = data.pairs(root, split)
        yield from problems
        reader = data.reader(pairs)
        for number, (_, mask) in enumerate(pairs):
            if problem := reader.problem(number):
                yield problem
                continue
            if data.num_classes is None and (odd := _odd_values(mask)):
                yield f"{mask} {odd}"


def _odd_values(path: Path) -> str | None:
    """What is odd about the values of a binary mask that is not a JPEG."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return None
    image = _open(path)
    values = np.unique(np.asarray(image if image.mode == "P" else image.convert("L")))
    if len(values) <= 2 and (image.mode == "P" or set(values.tolist()) <= {0, 1, 255}):
        return None
    shown = ", ".join(map(str, values[:_MANY_VALUES].tolist()))
    more = ", ..." if len(values) > _MANY_VALUES else ""
    return f"is not binary: it has {len(values)} values ({shown}{more})"


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
        return size[::-1] if image.getexif().get(_ORIENTATION) in _SWAPPED else size


def _indices(path: Path) -> np.ndarray:
    image = _open(path)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ImageError(
            f"{path} must hold class indices (grey or palette), but its mode is {image.mode}."
        )
    return np.asarray(image).astype(np.int64)


def _open(path: Path) -> Image.Image:
    # Masks are read as they are: `read_image` would turn palettes and 16 bits into colours.
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ImageError(f"no such mask: {path}.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image.") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise ImageError(f"{path} cannot be decoded ({str(error).splitlines()[0]}).") from None
