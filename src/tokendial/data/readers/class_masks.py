"""Read masks whose pixels are classes: class indices, or colours of a palette."""

# Shape legend: H and W pixels.

from pathlib import Path
from typing import Literal

import numpy as np

from tokendial.data.readers.colour_codes import Colour, encode, format_codes
from tokendial.data.readers.images import ImageError
from tokendial.data.readers.mask_files import IGNORED, MaskFile, open_mask

Palette = Literal["voc", "cityscapes"] | list[Colour]
"""Colours of the class values 0, 1, ..., or the name of the data set that defines them."""
_CITYSCAPES: list[Colour] = [
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
]
_CITYSCAPES_IGNORED: list[Colour] = [
    (0, 0, 0),
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
]
_NUM_VOC_CLASSES = 21
_VOC_IGNORED: list[Colour] = [(224, 224, 192)]


def read_class_mask(
    path: Path,
    num_classes: int,
    *,
    ignore_zero: bool = False,
    ignore: int | Colour | None = None,
    palette: Palette | None = None,
) -> np.ndarray:
    """Read a mask as class indices [H, W] uint8, with `IGNORED` at ignored pixels.

    Args:
        path: The mask file.
        num_classes: Number of classes.
        ignore_zero: Whether value 0 is ignored and value 1 is the first class, as in ADE20K.
        ignore: Value or colour that is ignored. Value 255 is always ignored.
        palette: Colours of the values 0, 1, ...; None if the file stores the values themselves.

    Raises:
        ImageError: If the file cannot be read, does not store class indices, holds an index outside
            the classes, or has a colour that the palette does not list.
    """
    file = open_mask(path)
    values = _stored_indices(file) if palette is None else _palette_indices(file, palette, ignore)
    first = int(ignore_zero)
    ignored = (values == IGNORED) | (ignore_zero & (values == 0))
    if (is_ignored := file.is_ignored(ignore)) is not None:
        ignored |= is_ignored
    outside = values[~ignored & ((values < first) | (values >= num_classes + first))]
    if outside.size:
        raise ImageError(
            f"{path} has the value {outside[0]}, but classes are {first} to "
            f"{num_classes + first - 1} and {IGNORED} is ignored."
        )
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)


def palette_colours(palette: Palette) -> tuple[list[Colour], list[Colour]]:
    """Return the colours of the values 0, 1, ... and the colours that are ignored."""
    if palette == "cityscapes":
        return _CITYSCAPES, _CITYSCAPES_IGNORED
    if palette != "voc":
        return list(palette), []
    # PASCAL VOC: bits 0, 3, 6 of a class index become the highest bits of red, bits 1, 4, 7 those
    # of green, and bits 2, 5 those of blue.
    channels = [
        [sum((index >> 3 * k + c & 1) << 7 - k for k in range(3)) for c in range(3)]
        for index in range(_NUM_VOC_CLASSES)
    ]
    return [(red, green, blue) for red, green, blue in channels], _VOC_IGNORED


def _stored_indices(file: MaskFile) -> np.ndarray:
    if file.values is file.codes and (file.codes < 0).any():
        raise ImageError(
            f"{file.path} has colours such as {format_codes([file.codes.min()])}, but must hold "
            "class indices (grey or palette), unless data.palette says which colour is which class."
        )
    if file.has_fractions:
        raise ImageError(f"{file.path} must hold class indices, but has fractions.")
    return file.values.astype(np.int64)


def _palette_indices(file: MaskFile, palette: Palette, ignore: int | Colour | None) -> np.ndarray:
    colours, ignored_colours = palette_colours(palette)
    index_of = {encode(colour): index for index, colour in enumerate(colours)}
    index_of = {encode(colour): IGNORED for colour in ignored_colours} | index_of
    if isinstance(ignore, tuple):
        index_of[encode(ignore)] = IGNORED
    known = np.array(sorted(index_of))
    positions = np.searchsorted(known, file.codes).clip(max=len(known) - 1)
    if (unknown := file.codes[known[positions] != file.codes]).size:
        raise ImageError(
            f"{file.path} has the colour {format_codes([unknown[0]])}, which data.palette does not "
            f"list (number of pixels with such colours: {unknown.size:,})."
        )
    return np.asarray(np.array([index_of[code] for code in known.tolist()], np.int64)[positions])
