"""Convert images of any bit depth to 8-bit RGB, by one rule for all files of a data set.

Images of at most 8 bits keep their values. Grey images of more bits are scaled from a range to 0
(black) to 255 (white). The range is `data.range` if that is set, else the limits of the file's
number type. Images are not stretched by their own values by default, because equal objects would
then look different in different images.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps

ValueRange = tuple[float, float] | Literal["image"] | None
"""Values that become black and white in grey images of more than 8 bits: (low, high); "image" for
the smallest and the largest value of each image; None for the limits of the file's number type."""

_BITS, _WHITE_IS_ZERO, _SIGNED = 258, 262, 339  # TIFF tags
_SAMPLE_SIZE = 32
_MIN_USED_SHARE = 0.3
_RANGE_NEEDS_GREY = (
    "has 16 bits per colour channel, of which 8 are read; data.range is for grey images only."
)
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class RangeError(ValueError):
    """A value range is missing or cannot be used; the message is to follow the name of a file."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How an image file stores grey levels of more than 8 bits."""

    name: str
    """Name of the number type in messages, such as "16-bit integers"."""
    dtype: type
    """NumPy type of the stored values."""
    bounds: tuple[float, float] | None
    """Default values of black and white; None if the number type does not suggest any."""
    inverted: bool = False
    """Whether the smallest value is white and the largest is black."""


_DEEP_COLOURS = Depth("16-bit colours", np.float32, (0.0, 65535.0))
"""Depth of colour images with 16 bits per channel; Pillow reads the upper 8 bits."""


def check_range(value: ValueRange) -> None:
    """Check the field `range` of a data set.

    Raises:
        ValueError: If it is not two rising numbers, "image" or None.
    """
    if value is None or value == "image":
        return
    if isinstance(value, str) or len(value) != 2 or not -math.inf < value[0] < value[1] < math.inf:
        raise ValueError(f'range must be two rising numbers, "image" or null, got {value!r}.')


def rgb_image(image: Image.Image, value_range: ValueRange = None) -> Image.Image:
    """Return an opened image as 8-bit RGB, turned upright, transparent pixels on white.

    Args:
        image: Image that Pillow has opened but not loaded yet.
        value_range: The field `range` of the data set.

    Raises:
        RangeError: If the image needs a value range and none is given, or if the given one does not
            apply to the image.
    """
    depth = depth_of(image)
    if depth is _DEEP_COLOURS and value_range is not None:
        raise RangeError(_RANGE_NEEDS_GREY)
    upright = ImageOps.exif_transpose(image)
    if depth is not None and depth is not _DEEP_COLOURS:
        return _scale_to_8_bits(
            stored_values(upright, depth), depth, value_range, image.info.get("transparency")
        )
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")


def depth_of(image: Image.Image) -> Depth | None:
    """Return how an image, opened but not loaded, stores more than 8 bits; None if it has 8."""
    tags: Any = getattr(image, "tag_v2", {})
    inverted = tags.get(_WHITE_IS_ZERO) == 0
    signed = tags.get(_SIGNED, (1,))[0] == 2
    if image.mode == "F":
        return Depth("floating-point numbers", np.float32, (0.0, 1.0), inverted)
    if image.mode == "L" and signed:
        return Depth("signed 8-bit integers", np.int8, (-128.0, 127.0), inverted)
    if not image.mode.startswith("I"):
        return _DEEP_COLOURS if _has_deep_colours(image) else None
    # Only TIFF has depths other than 16 bits here: Pillow scales PGM to 65535.
    bits = tags.get(_BITS, (16,))[0]
    if bits > 16:
        dtype = np.int32 if signed else np.uint32
        return Depth(f"{bits}-bit integers", dtype, None, inverted)
    if signed:
        return Depth("signed 16-bit integers", np.int32, (-32768.0, 32767.0), inverted)
    return Depth(f"{bits}-bit integers", np.int32, (0.0, 2.0**bits - 1), inverted)


def warn_of_unused_range(
    sources: Iterable[tuple[str, Path | BinaryIO]], value_range: ValueRange, where: object
) -> None:
    """Log a warning if images of more than 8 bits use less than 30 % of the range.

    Args:
        sources: Names and files of a sample of the images. Files that cannot be read are skipped
            here; the check of all images reports them.
        value_range: The field `range` of the data set.
        where: Name of the data set in the warning.

    Raises:
        ValueError: If one of the images needs a value range and none is given.
    """
    ends: list[tuple[float, float]] = []
    bounds: list[tuple[float, float]] = []
    for name, source in sources:
        try:
            with Image.open(source) as image:
                depth = depth_of(image)
                if depth is None:
                    continue
                values = stored_values(image, depth)
        except Exception:  # broken data; see the end of `readers.images._decode`
            continue
        ends.append(_min_max(values))
        try:
            bounds.append(_bounds(*ends[-1], depth, value_range))
        except RangeError as error:
            raise ValueError(f"data: {name} {error}") from None
    if not ends or value_range == "image":
        return
    (low, high), (black, white) = (
        (min(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in (ends, bounds)
    )
    if min(high, white) - max(low, black) < _MIN_USED_SHARE * (white - black):
        _LOG.warning(
            "data: values of more than 8 bits in %s lie between %g and %g, but black is %g and "
            "white is %g, so images have little contrast; data.range=%s would fit.",
            *(where, low, high, black, white, _suggest_range(low, high)),
        )


def sample_files(paths: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) for at most 32 of the files, in the form of `warn_of_unused_range`."""
    return ((str(path), path) for path in sample_evenly(list(paths)))


def sample_evenly(items: Sequence[T]) -> list[T]:
    """Return at most 32 of the items, at equal distances."""
    return list(items[:: -(-len(items) // _SAMPLE_SIZE) or 1])


def stored_values(image: Image.Image, depth: Depth) -> np.ndarray:
    """Return the values [H, W] that the file stores, in the number type of the file."""
    values = np.asarray(image)
    if depth is _DEEP_COLOURS:
        return values * np.float32(257)
    # Pillow has neither signed 8-bit nor unsigned 32-bit modes: it gives the same bits as the other
    # type.
    if values.dtype.itemsize == np.dtype(depth.dtype).itemsize:
        return values.view(depth.dtype)
    return values.astype(depth.dtype)


def _scale_to_8_bits(
    values: np.ndarray, depth: Depth, value_range: ValueRange, transparent: object
) -> Image.Image:
    low, high = _bounds(*_min_max(values), depth, value_range)
    share = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    share[~np.isfinite(share)] = float(depth.inverted)
    grey = (share * 255.0).round().clip(0, 255).astype(np.uint8)
    if depth.inverted:
        grey = 255 - grey
    # A PNG may name one grey level as the transparent one.
    grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _bounds(low: float, high: float, depth: Depth, value_range: ValueRange) -> tuple[float, float]:
    """Return the values of black and white for a file whose values lie between `low` and `high`."""
    if depth is _DEEP_COLOURS and value_range is not None:
        raise RangeError(_RANGE_NEEDS_GREY)
    if value_range == "image":
        return low, high
    if value_range is not None:
        return value_range
    black, white = depth.bounds or (math.inf, -math.inf)
    if not black <= low <= high <= white:
        expected = f", not {black:g} to {white:g}" if depth.bounds else ""
        raise RangeError(
            f"holds {depth.name} from {low:g} to {high:g}{expected}: say which values are black "
            f"and white, such as data.range={_suggest_range(low, high)}."
        )
    return black, white


def _min_max(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value; (0, 0) if there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _suggest_range(low: float, high: float) -> str:
    """Return a range that covers the values, in the form of the command line, such as "[0,4095]".

    If no value is negative, it goes from 0 to the largest number of the bits that are needed.
    """
    if low < 0 or high <= 1:
        return f"[{low:g},{high:g}]"
    return f"[0,{2 ** max(8, math.ceil(math.log2(high + 1))) - 1}]"


def _has_deep_colours(image: Image.Image) -> bool:
    return image.mode.startswith(("RGB", "LA")) and ";16" in raw_mode(image)


def raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixel format in the file, such as "L;4", before it is loaded."""
    tiles: Any = getattr(image, "tile", ())
    args = tiles[0][3] if tiles else ""
    raw = args[0] if isinstance(args, tuple) else args
    return raw if isinstance(raw, str) else ""
