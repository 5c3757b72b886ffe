"""One integer per pixel for grey levels and colours, so that masks of both are compared alike.

The code of a grey level is the level itself (0 or more). The code of a colour (r, g, b) is
-1 - (r << 16 | g << 8 | b), a number below 0. A colour with r = g = b has the code of its grey
level.
"""

# Shape legend: H and W pixels.

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
"""Red, green and blue, each in [0, 255]."""
_MAX_DISTINCT = 1024
_MAX_SHOWN = 12
_MAX_HUE_DIFFERENCE = 64


def encode(value: int | Colour) -> int:
    """Return the code of a grey level or colour."""
    if isinstance(value, int):
        return value
    red, green, blue = value
    return red if red == green == blue else -1 - (red << 16 | green << 8 | blue)


def decode(code: int) -> int | Colour:
    """Return the grey level or colour of a code."""
    if code >= 0:
        return code
    red, green, blue = _channels(np.array(code)).tolist()
    return red, green, blue


def encode_pixels(colours: np.ndarray) -> np.ndarray:
    """Return the codes [...] of colours [..., 3] uint8; the codes are uint8 if all are grey."""
    red, green, blue = (colours[..., channel] for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    wide = colours.astype(np.int32)
    coloured = -1 - (wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2])
    return np.where((red == green) & (red == blue), red, coloured)


def sort_codes(codes: Iterable[int]) -> list[int]:
    """Return grey levels in rising order, then colours."""
    return sorted(map(int, codes), key=lambda code: (code < 0, abs(code)))


def distinct_codes(codes: np.ndarray) -> frozenset[int]:
    """Return the codes that occur in [H, W].

    If there are more than 1,024, an even sample of them is returned, with the smallest and the
    largest.
    """
    flat = codes.ravel()
    if codes.dtype == np.uint8:
        found = np.flatnonzero(Image.fromarray(flat.reshape(1, -1)).histogram())
    elif flat.size and flat.min() >= 0 and flat.max() < 2**16:
        found = np.flatnonzero(np.bincount(flat))
    else:
        # With return_counts NumPy sorts, which is many times faster here than its hashing.
        found, _ = np.unique(flat, return_counts=True)
    if len(found) > _MAX_DISTINCT:
        found = found[np.linspace(0, len(found) - 1, _MAX_DISTINCT).astype(int)]
    return frozenset(found.tolist())


def is_one_of(codes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return a bool array that is true where `codes` is one of `values`."""
    if codes.dtype != np.uint8:
        return np.isin(codes, values)
    table = np.zeros(256, bool)
    table[[value for value in values if 0 <= value < 256]] = True
    return np.asarray(table[codes])


def brightness(codes: np.ndarray) -> np.ndarray:
    """Return grey levels as they are, and for colours the largest of red, green and blue."""
    if codes.dtype.kind == "u" or not (codes < 0).any():
        return codes
    return np.asarray(np.where(codes < 0, _channels(codes).max(-1), codes))


def brightness_levels(codes: Iterable[int]) -> frozenset[int]:
    """Return the distinct brightness levels of some codes."""
    return frozenset(brightness(np.array(sorted(codes), np.int64)).tolist())


def have_one_hue(codes: np.ndarray) -> bool:
    """Return whether the colours differ in brightness but hardly in hue."""
    levels = brightness(codes)
    bright = levels > 127
    channels = np.where(codes[bright, None] < 0, _channels(codes[bright]), codes[bright, None])
    hues = channels * 255 // levels[bright, None]
    return bool(bright.any() and (np.ptp(hues, axis=0) <= _MAX_HUE_DIFFERENCE).all())


def format_codes(codes: Iterable[int]) -> str:
    """Return codes for a message, such as "0, 128 and [255,0,0]"; at most 12 are shown."""
    values = [decode(code) for code in sort_codes(codes)]
    shown = [
        str(value) if isinstance(value, int) else f"[{','.join(map(str, value))}]"
        for value in values[:_MAX_SHOWN]
    ]
    more = [f"{len(values) - _MAX_SHOWN} more"] if len(values) > _MAX_SHOWN else []
    *some, last = shown + more
    return f"{', '.join(some)} and {last}" if some else last


def format_setting(code: int) -> str:
    """Return a code as a value of `data.mask` on the command line: "[255]" or "[[255,0,0]]"."""
    value = decode(code)
    return f"[{value}]" if isinstance(value, int) else f"[[{','.join(map(str, value))}]]"


def _channels(codes: np.ndarray) -> np.ndarray:
    """Return red, green and blue [..., 3] of the codes of colours."""
    return np.asarray((-1 - codes)[..., None] >> np.array([16, 8, 0]) & 255)
