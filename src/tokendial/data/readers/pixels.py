"""Pixels of any depth as 8-bit RGB, by one rule for all files of a data set.

Files of at most 8 bits are read as they are. What a deeper file holds is scaled from a range, whose
ends are black and white: that of the data set if one is set, else that of the file's type. No image
is stretched by its own values unless that is asked for, as equal things would look different then.
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
"""What is black and what is white in files of more than 8 bits; "image": the smallest and the
largest value of each image; None: the range of the file's type."""

_BITS, _WHITE_IS_ZERO, _SIGNED = 258, 262, 339  # tags of TIFF
_SAMPLE = 32
_SMALL_PART = 0.3
_OF_GREYS = "has colours of 16 bits, of which 8 are read; data.range is for grey levels."
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class RangeError(ValueError):
    """Values of which nothing says what is black and white; the message follows a file's name."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How a file stores more than 8 bits of grey."""

    kind: str
    """What its values are, for messages."""
    dtype: type
    """Numbers that its values are."""
    bounds: tuple[float, float] | None
    """What is black and white if nothing else is said; None: the type does not tell."""
    inverted: bool = False
    """Whether the smallest value is white."""


_COLOURS = Depth("16-bit colours", np.float32, (0.0, 65535.0))
"""Pillow gives their upper 8 bits."""


def check_range(value: ValueRange) -> None:
    """Check a data set's field `range`.

    Raises:
        ValueError: If it is not two rising numbers.
    """
    if value is None or value == "image":
        return
    if isinstance(value, str) or len(value) != 2 or not -math.inf < value[0] < value[1] < math.inf:
        raise ValueError(f'range must be two rising numbers, "image" or null, got {value!r}.')


def rgb_image(image: Image.Image, value_range: ValueRange = None) -> Image.Image:
    """An opened image as 8-bit RGB, upright; transparent pixels lie on white.

    Args:
        image: As Pillow has opened it, not loaded yet.
        value_range: Of the data set.

    Raises:
        RangeError: If nothing says what is black and white, or the range cannot be used.
    """
    depth = depth_of(image)
    if depth is _COLOURS and value_range is not None:
        raise RangeError(_OF_GREYS)
    upright = ImageOps.exif_transpose(image)
    if depth is not None and depth is not _COLOURS:
        return _scaled(
            stored_values(upright, depth), depth, value_range, image.info.get("transparency")
        )
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")


def depth_of(image: Image.Image) -> Depth | None:
    """How an opened image, not loaded yet, stores more than 8 bits; None: it has no more."""
    tags: Any = getattr(image, "tag_v2", {})
    inverted = tags.get(_WHITE_IS_ZERO) == 0
    signed = tags.get(_SIGNED, (1,))[0] == 2
    if image.mode == "F":
        return Depth("floating-point numbers", np.float32, (0.0, 1.0), inverted)
    if image.mode == "L" and signed:
        return Depth("signed 8-bit integers", np.int8, (-128.0, 127.0), inverted)
    if not image.mode.startswith("I"):
        return _COLOURS if _deep_colours(image) else None
    # Only TIFF has other depths than 16 bits: Pillow scales PGM to 65535.
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
    """Warn if images of more than 8 bits use a small part of what lies between black and white.

    Args:
        sources: Names and files of some of the images; those that cannot be read are left to
            whoever reads all of them.
        value_range: Of the data set.
        where: What the warning names.

    Raises:
        ValueError: If nothing says what is black and white in one of them.
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
        except Exception:  # Pillow's decoders raise what they please
            continue
        ends.append(_ends(values))
        try:
            bounds.append(_bounds(*ends[-1], depth, value_range))
        except RangeError as error:
            raise ValueError(f"data: {name} {error}") from None
    if not ends or value_range == "image":
        return
    (low, high), (black, white) = (
        (min(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in (ends, bounds)
    )
    if min(high, white) - max(low, black) < _SMALL_PART * (white - black):
        _LOG.warning(
            "data: values of more than 8 bits in %s lie between %g and %g, but black is %g and "
            "white is %g, so little can be seen; data.range=%s would fit.",
            *(where, low, high, black, white, _fitting_range(low, high)),
        )


def named(paths: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Some of the files, as `warn_of_unused_range` takes them."""
    return ((str(path), path) for path in spread(list(paths)))


def spread(items: Sequence[T]) -> list[T]:
    """At most 32 items, at equal distances."""
    return list(items[:: -(-len(items) // _SAMPLE) or 1])


def stored_values(image: Image.Image, depth: Depth) -> np.ndarray:
    """Grey levels [H, W] as the file has them."""
    values = np.asarray(image)
    if depth is _COLOURS:
        return values * np.float32(257)
    # Pillow knows neither signed bytes nor unsigned numbers of 32 bits.
    if values.dtype.itemsize == np.dtype(depth.dtype).itemsize:
        return values.view(depth.dtype)
    return values.astype(depth.dtype)


def _scaled(
    values: np.ndarray, depth: Depth, value_range: ValueRange, transparent: object
) -> Image.Image:
    low, high = _bounds(*_ends(values), depth, value_range)
    share = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    share[~np.isfinite(share)] = float(depth.inverted)
    grey = (share * 255.0).round().clip(0, 255).astype(np.uint8)
    if depth.inverted:
        grey = 255 - grey
    # A PNG may name one grey level as the transparent one.
    grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _bounds(low: float, high: float, depth: Depth, value_range: ValueRange) -> tuple[float, float]:
    """What is black and white in a file whose values lie between `low` and `high`."""
    if depth is _COLOURS and value_range is not None:
        raise RangeError(_OF_GREYS)
    if value_range == "image":
        return low, high
    if value_range is not None:
        return value_range
    black, white = depth.bounds or (math.inf, -math.inf)
    if not black <= low <= high <= white:
        expected = f", not {black:g} to {white:g}" if depth.bounds else ""
        raise RangeError(
            f"holds {depth.kind} from {low:g} to {high:g}{expected}: say what is black and white, "
            f"such as data.range={_fitting_range(low, high)}."
        )
    return black, white


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest number."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _fitting_range(low: float, high: float) -> str:
    """A range that covers values: from 0 to the largest number of so many bits, if none is below.

    Written as on the command line.
    """
    if low < 0 or high <= 1:
        return f"[{low:g},{high:g}]"
    return f"[0,{2 ** max(8, math.ceil(math.log2(high + 1))) - 1}]"


def _deep_colours(image: Image.Image) -> bool:
    return image.mode.startswith(("RGB", "LA")) and ";16" in raw_mode(image)


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for how the pixels of an image lie in its file, before it is loaded."""
    tiles: Any = getattr(image, "tile", ())
    args = tiles[0][3] if tiles else ""
    raw = args[0] if isinstance(args, tuple) else args
    return raw if isinstance(raw, str) else ""
