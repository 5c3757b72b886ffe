"""Read binary masks: decide from the files which pixels are inside, then read each file that way.

The decision is made once for all masks of a data set, from the values that they hold together. So
an empty mask is read like the masks beside it. Where several readings are possible, an error lists
them with the setting that chooses each.
"""

# Shape legend: H and W pixels.

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tokendial.data.readers.colour_codes import (
    Colour,
    brightness,
    brightness_levels,
    decode,
    distinct_codes,
    encode,
    format_codes,
    format_setting,
    have_one_hue,
    is_one_of,
    sort_codes,
)
from tokendial.data.readers.images import ImageError
from tokendial.data.readers.mask_files import IGNORED, MaskFile, open_mask

MaskRule = Literal["auto", "alpha", "half", "nonzero"] | list[int | Colour]
"""Which pixels of a binary mask are inside; see `Pairs.mask`."""
_FEW_COLOURS = 8
_SAMPLE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class MaskContent:
    """Values that occur in one mask file, without those that are ignored."""

    path: Path
    """The mask file."""
    codes: frozenset[int]
    """Grey levels and colours, as integers of `readers.colour_codes`; with `has_shades`, the
    brightness of the colours."""
    has_shades: bool
    """Whether the file has many colours, all of one hue, as a coloured mask with soft borders."""
    is_lossy: bool
    """Whether the file format changes values slightly, as JPEG does."""
    visible_codes: frozenset[int] | None
    """Codes of the pixels that are not transparent; None if the file has no transparency."""
    is_partly_transparent: bool
    """Whether some pixels are transparent and others are not."""


@dataclass(frozen=True, slots=True)
class MaskReading:
    """How all binary masks of a data set are read."""

    rule: Literal["alpha", "half", "nonzero"] | tuple[int | Colour, ...]
    """Pixels that are inside. alpha: those that are not transparent; half: those brighter than half
    of the full range; nonzero: those that are not 0; a tuple: those with one of these values."""
    known_codes: frozenset[int] | None = None
    """Codes that occurred in the files from which the rule was found; other codes are an error.
    None allows all codes."""
    from_files: bool = False
    """Whether the rule was found from the files; else the user has set it."""
    is_deep: bool | None = None
    """Whether the full range of grey levels of more than 8 bits ends at 65535 instead of 255; None
    decides it for each file by its largest value."""

    def __str__(self) -> str:
        if not isinstance(self.rule, str):
            if not self.rule:
                return "no pixels"
            return f"pixels of value {format_codes(map(encode, self.rule))}"
        return {
            "alpha": "pixels that are not transparent",
            "half": "pixels brighter than half of the range",
            "nonzero": "pixels that are not 0",
        }[self.rule]


def read_binary_mask(
    path: Path, reading: MaskReading | None = None, ignore: int | Colour | None = None
) -> np.ndarray:
    """Read a binary mask as [H, W] uint8: 1 inside, 0 outside, `IGNORED` at ignored pixels.

    Args:
        path: The mask file.
        reading: How the masks of the data set are read; None decides it from this file alone.
        ignore: Stored value or colour that is ignored.

    Raises:
        ImageError: If the file cannot be read or does not fit the reading.
        ValueError: If no reading is given and the file can be read in several ways.
    """
    if reading is None:
        reading = decide_reading([inspect_mask(path, ignore)], path)
    file = open_mask(path)
    ignored = file.is_ignored(ignore)
    codes = file.codes if ignored is None else np.where(ignored, 0, file.codes)
    mask = _is_inside(file, codes, reading).astype(np.uint8)
    if ignored is not None:
        mask[ignored] = IGNORED
    return mask


def _is_inside(file: MaskFile, codes: np.ndarray, reading: MaskReading) -> np.ndarray:
    if reading.rule == "alpha":
        return _is_opaque(file, reading)
    if reading.rule == "half":
        return _is_bright(file, codes, reading)
    if reading.rule == "nonzero":
        return np.asarray(codes != 0)
    if reading.known_codes is None:
        numbers = [value for value in reading.rule if isinstance(value, int)]
        colours = [encode(value) for value in reading.rule if not isinstance(value, int)]
        return np.asarray(is_one_of(file.values, numbers) | is_one_of(codes, colours))
    if not (is_known := is_one_of(codes, [*reading.known_codes, 0])).all():
        raise ImageError(
            f"{file.path} has {format_codes([codes[~is_known][0]])}, but masks of its set have "
            f"{format_codes(reading.known_codes)}."
        )
    return is_one_of(codes, [encode(value) for value in reading.rule])


def _is_opaque(file: MaskFile, reading: MaskReading) -> np.ndarray:
    if file.alpha is None:
        raise ImageError(f"{file.path} has no alpha channel, but other masks of its set have one.")
    if reading.known_codes is not None:
        visible = file.visible_codes()
        if not visible <= reading.known_codes:
            raise ImageError(
                f"{file.path} shows {format_codes(visible - reading.known_codes)}, but other masks "
                "of its set, in which the alpha channel tells what is inside, do not."
            )
    return np.asarray(file.alpha > 127)


def _is_bright(file: MaskFile, codes: np.ndarray, reading: MaskReading) -> np.ndarray:
    levels = brightness(codes)
    top = int(levels.max(initial=0))
    is_deep = top > 255 if reading.is_deep is None else reading.is_deep and levels.itemsize > 1
    half = 32767 if is_deep else 127
    # A mask of 0 and one small value is likely to be of another kind than the masks of its set.
    is_suspect = reading.from_files and not file.is_lossy and 0 < top <= half
    if is_suspect and is_one_of(levels, (0, top)).all():
        raise ImageError(
            f"{file.path} has the values 0 and {top}, but masks of its set are read by half "
            f"of their range, {half}, which would leave it empty: data.mask=half does so, "
            "data.mask=nonzero takes the pixels that are not 0."
        )
    return np.asarray(levels > half)


def find_reading(
    rule: MaskRule, paths: Iterable[Path], ignore: int | Colour | None, where: object
) -> MaskReading:
    """Return how the binary masks of a data set are read.

    Args:
        rule: The setting `data.mask`; "auto" decides from the files.
        paths: The mask files. Up to 1,000 are read, and only for "auto".
        ignore: Stored value or colour that is ignored.
        where: Name of the data set in messages.

    Raises:
        ValueError: If the masks can be read in several ways.
    """
    if rule == "auto":
        return decide_reading(inspect_masks(paths, ignore), where)
    return MaskReading(rule if isinstance(rule, str) else tuple(rule))


def inspect_masks(paths: Iterable[Path], ignore: int | Colour | None) -> list[MaskContent]:
    """Return the content of up to 1,000 of the masks, at even distances in the list.

    Files that cannot be read are skipped here; the check of all files reports them.
    """
    sample = list(paths)
    sample = sample[:: -(-len(sample) // _SAMPLE_SIZE) or 1]

    def inspect(path: Path) -> MaskContent | None:
        try:
            return inspect_mask(path, ignore)
        except ImageError:
            return None

    with ThreadPoolExecutor() as pool:
        return [content for content in pool.map(inspect, sample) if content is not None]


def inspect_mask(path: Path, ignore: int | Colour | None = None) -> MaskContent:
    """Return the values that occur in a mask file.

    Raises:
        ImageError: If the file cannot be read.
    """
    file = open_mask(path)
    ignored = file.is_ignored(ignore)
    codes = distinct_codes(file.codes if ignored is None else file.codes[~ignored])
    has_many_colours = sum(code < 0 for code in codes) > _FEW_COLOURS
    has_shades = has_many_colours and have_one_hue(np.array(sorted(codes)))
    is_partly_transparent = False
    if file.alpha is not None:
        is_partly_transparent = bool((file.alpha > 127).any() and (file.alpha <= 127).any())
    return MaskContent(
        path=path,
        codes=brightness_levels(codes) if has_shades else codes,
        has_shades=has_shades,
        is_lossy=file.is_lossy,
        visible_codes=None if file.alpha is None else file.visible_codes(),
        is_partly_transparent=is_partly_transparent,
    )


def decide_reading(contents: Sequence[MaskContent], where: object) -> MaskReading:
    """Return how masks with these contents are read.

    The first rule that applies decides:

    1. Some mask is partly transparent: pixels that are not transparent are inside.
    2. All masks together have one value: its pixels are inside, unless it is 0.
    3. They have two values, and one is 0 or they lie in different halves of the range: pixels with
       the other or larger value are inside.
    4. They are grey with soft borders or stored as JPEG: pixels brighter than half of the range are
       inside.

    Args:
        contents: Contents of the masks of a data set.
        where: Name of the data set in messages.

    Raises:
        ValueError: If no rule applies, so the masks can be read in several ways.
    """
    if any(content.is_partly_transparent for content in contents):
        return _reading_by_alpha(contents, where)
    codes = frozenset[int]().union(*(content.codes for content in contents))
    if any(content.has_shades for content in contents):
        codes = brightness_levels(codes)
    values = sort_codes(codes)
    is_grey = all(value >= 0 for value in values)
    is_deep = any(value > 255 for value in values)
    half = 32767 if is_deep else 127
    if len(values) <= 1:
        inside = tuple(decode(value) for value in values if value)
        return MaskReading(inside, codes, from_files=True)
    if len(values) == 2 and (values[0] == 0 or (is_grey and values[0] <= half < values[1])):
        return MaskReading((decode(values[1]),), codes, from_files=True)
    has_bright_border = any(half < value < values[-1] for value in values)
    is_lossy = all(content.is_lossy for content in contents if len(content.codes) > 1)
    is_soft = len(values) > 3 and has_bright_border
    if is_grey and values[-1] > half and (is_lossy or is_soft):
        return MaskReading("half", from_files=True, is_deep=is_deep)
    raise ValueError(f"data: {where}: {_describe_choices(values, contents, half)}")


def _reading_by_alpha(contents: Sequence[MaskContent], where: object) -> MaskReading:
    transparent = [content for content in contents if content.is_partly_transparent]
    for content in transparent:
        if len(content.visible_codes or ()) > 1:
            raise ValueError(
                f"data: {where}: both transparency and colour vary in {content.path}: "
                "data.mask=alpha takes the pixels that are not transparent, data.mask=half those "
                "that are bright, data.mask=nonzero those that are not black."
            )
    visible = frozenset[int]().union(*(content.visible_codes or () for content in transparent))
    return MaskReading("alpha", visible, from_files=True)


def _describe_choices(values: Sequence[int], contents: Sequence[MaskContent], half: int) -> str:
    """Return a message that lists the possible readings and the setting that chooses each."""
    example: dict[int, Path] = {}
    for content in contents:
        for code in content.codes:
            example.setdefault(code, content.path)
    choices = []
    if len(values) == 2:
        choices = [f"data.mask={format_setting(value)}" for value in values]
    elif len(values) == 3 and values[0] == 0:
        choices = [
            f"data.mask={format_setting(inside)} data.ignore={format_setting(ignored)[1:-1]}"
            for inside, ignored in ((values[1], values[2]), (values[2], values[1]))
        ]
    if values[0] == 0:
        choices.append("data.mask=nonzero (pixels that are not 0)")
    if all(value >= 0 for value in values):
        choices.append(f"data.mask=half (pixels above {half})")
    if len(values) > 2 and values[0] == 0:
        choices.append("data.classes=..., if these are classes")
    return (
        f"binary masks have {format_codes(values)} (such as "
        f"{example.get(values[-1], 'several files')}), which can be read in several ways; "
        f"choose one: {'; '.join(choices)}."
    )
