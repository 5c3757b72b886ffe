"""Masks as people have them on disk: which pixels are inside, or of which class.

What a binary mask means is settled once for all files of a set, by the values that they have
together, so that an empty mask is read as the one beside it is. Where several readings are
possible, that is an error which names them and the field that chooses.
"""

# Shape legend: H and W pixels.

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokendial.data.readers.images import ImageError
from tokendial.data.readers.pixels import depth_of, raw_mode, stored_values

Colour = tuple[int, int, int]
MaskRule = Literal["auto", "alpha", "half", "nonzero"] | list[int | Colour]
"""What is inside a binary mask; see `Pairs.mask`."""
Palette = Literal["voc", "cityscapes"] | list[Colour]
"""Colours of the classes, in their order, or whose they are."""

IGNORED = 255
"""Value of a mask where nothing is asked."""
_FEW = 8
_LOOKED_AT = 1000
_KEPT = 1024
_HUES = 64
_UNSCALED = {"L;2": 85, "L;4": 17}
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
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
_CITYSCAPES_VOID: list[Colour] = [
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


@dataclass(frozen=True, slots=True)
class _Stored:
    """A mask file, upright."""

    path: Path
    values: np.ndarray
    """[H, W] as stored: indices of a palette, or as `codes`."""
    codes: np.ndarray
    """[H, W] what is seen: grey levels from 0 on, and colours as `_code` has them."""
    alpha: np.ndarray | None
    """[H, W] uint8, or None if nothing can be transparent."""
    lossy: bool
    """Whether the format changes values a little."""
    fractions: bool = False
    """Whether it has numbers between whole ones."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a mask file contains."""

    path: Path
    """The file."""
    codes: frozenset[int]
    """Its grey levels and colours; with `soft`, the brightness of its colours instead."""
    soft: bool
    """Whether it has many colours, all of one hue."""
    lossy: bool
    """Whether its format changes values a little."""
    visible: frozenset[int] | None
    """What is not transparent; None if nothing can be."""
    see_through: bool
    """Whether some of it is transparent and some not."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How all binary masks of a set are read."""

    rule: Literal["alpha", "half", "nonzero"] | tuple[int | Colour, ...]
    """What is inside: what is not transparent, what is brighter than half of the full range, what
    is not black, or what has one of these values."""
    known: frozenset[int] | None = None
    """Grey levels and colours that a file may have where it was settled by them; None: any."""
    settled: bool = False
    """Whether the files told it; else a user did."""
    deep: bool | None = None
    """Whether the full range of grey levels of more than 8 bits is 65535, not 255; None: as the
    values of each file tell."""

    def __str__(self) -> str:
        if not isinstance(self.rule, str):
            return _told(map(_code, self.rule)) if self.rule else "nothing"
        return {
            "alpha": "what is not transparent",
            "half": "what is brighter than half of the range",
            "nonzero": "all that is not 0",
        }[self.rule]


def read_binary_mask(
    path: Path, reading: Reading | None = None, ignore: int | Colour | None = None
) -> np.ndarray:
    """Read a binary mask as [H, W] uint8 of 0, 1 and `IGNORED`.

    Args:
        path: The file.
        reading: How masks of its set are read; None: as this file alone tells.
        ignore: Stored value or colour where nothing is asked.

    Raises:
        ImageError: If the file cannot be read, or does not fit the reading.
        ValueError: If no reading is given and the file can be read in several ways.
    """
    if reading is None:
        reading = settle([look_at(path, ignore)], path)
    stored = _open(path)
    void = _ignored(stored, ignore)
    codes = stored.codes if void is None else np.where(void, 0, stored.codes)
    mask = _inside(stored, codes, reading).astype(np.uint8)
    if void is not None:
        mask[void] = IGNORED
    return mask


def _inside(stored: _Stored, codes: np.ndarray, reading: Reading) -> np.ndarray:
    if reading.rule == "alpha":
        if stored.alpha is None:
            raise ImageError(f"{stored.path} has no alpha channel, but other masks of its set do.")
        if reading.known is not None and not (seen := _visible(stored)) <= reading.known:
            raise ImageError(
                f"{stored.path} shows {_told(seen - reading.known)}, but other masks of its set, "
                "in which the alpha channel tells what is inside, do not."
            )
        return np.asarray(stored.alpha > 127)
    if reading.rule == "half":
        levels = _brightness(codes)
        top = int(levels.max(initial=0))
        deep = top > 255 if reading.deep is None else reading.deep and levels.dtype.itemsize > 1
        half = 32767 if deep else 127
        odd = reading.settled and not stored.lossy and 0 < top <= half
        if odd and _among(levels, (0, top)).all():
            raise ImageError(
                f"{stored.path} has the values 0 and {top}, but masks of its set are read by half "
                f"of their range, {half}, which would leave it empty: data.mask=half does so, "
                "data.mask=nonzero takes all that is not 0."
            )
        return np.asarray(levels > half)
    if reading.rule == "nonzero":
        return np.asarray(codes != 0)
    if reading.known is None:
        numbers = [value for value in reading.rule if isinstance(value, int)]
        colours = [_code(value) for value in reading.rule if not isinstance(value, int)]
        return np.asarray(_among(stored.values, numbers) | _among(codes, colours))
    if not (known := _among(codes, [*reading.known, 0])).all():
        raise ImageError(
            f"{stored.path} has {_told([codes[~known][0]])}, but masks of its set have "
            f"{_told(reading.known)}."
        )
    return _among(codes, [_code(value) for value in reading.rule])


def read_class_mask(
    path: Path,
    num_classes: int,
    *,
    ignore_zero: bool = False,
    ignore: int | Colour | None = None,
    palette: Palette | None = None,
) -> np.ndarray:
    """Read a mask of classes as [H, W] uint8 of their indices; `IGNORED` where nothing is asked.

    Args:
        path: The file.
        num_classes: How many there are.
        ignore_zero: Whether value 0 is ignored and 1 is the first class.
        ignore: Value (or colour) that is ignored; 255 is in any case.
        palette: Colours that stand for the values 0, 1, ...; None: the file has the values.

    Raises:
        ImageError: If the file cannot be read, holds no indices, or one beyond the classes, or a
            colour that the palette has not.
    """
    stored = _open(path)
    values = _indices(stored) if palette is None else _by_colour(stored, palette, ignore)
    first = int(ignore_zero)
    ignored = (values == IGNORED) | (ignore_zero & (values == 0))
    if (void := _ignored(stored, ignore)) is not None:
        ignored |= void
    outside = values[~ignored & ((values < first) | (values >= num_classes + first))]
    if outside.size:
        raise ImageError(
            f"{path} has the value {outside[0]}, but classes are {first} to "
            f"{num_classes + first - 1} and {IGNORED} is ignored."
        )
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)


def _indices(stored: _Stored) -> np.ndarray:
    if stored.values is stored.codes and (stored.codes < 0).any():
        raise ImageError(
            f"{stored.path} has colours such as {_told([stored.codes.min()])}, but must hold class "
            "indices (grey or palette), unless data.palette says which colour is which class."
        )
    if stored.fractions:
        raise ImageError(f"{stored.path} must hold class indices, but has fractions.")
    return stored.values.astype(np.int64)


def _by_colour(stored: _Stored, palette: Palette, ignore: int | Colour | None) -> np.ndarray:
    colours, void = palette_colours(palette)
    table = {_code(colour): index for index, colour in enumerate(colours)}
    table = {_code(colour): IGNORED for colour in void} | table
    if isinstance(ignore, tuple):
        table[_code(ignore)] = IGNORED
    known = np.array(sorted(table))
    places = np.searchsorted(known, stored.codes).clip(max=len(known) - 1)
    if (odd := stored.codes[known[places] != stored.codes]).size:
        raise ImageError(
            f"{stored.path} has the colour {_told([odd[0]])} ({odd.size} pixels are of colours "
            "that data.palette has not)."
        )
    return np.asarray(np.array([table[code] for code in known.tolist()], np.int64)[places])


def palette_colours(palette: Palette) -> tuple[list[Colour], list[Colour]]:
    """Colours of the classes in their order, and colours that are ignored."""
    if palette == "cityscapes":
        return _CITYSCAPES, _CITYSCAPES_VOID
    if palette != "voc":
        return list(palette), []
    # The bits of an index, lowest first, are spread over the highest bits of red, green and blue.
    channels = [
        [sum((index >> 3 * k + c & 1) << 7 - k for k in range(3)) for c in range(3)]
        for index in range(21)
    ]
    return [(red, green, blue) for red, green, blue in channels], [(224, 224, 192)]


def reading_of(
    rule: MaskRule, paths: Iterable[Path], ignore: int | Colour | None, where: object
) -> Reading:
    """How the binary masks of a set are read.

    Args:
        rule: What a user says; "auto": the files tell.
        paths: The masks; those that cannot be read are left to whoever reads all of them.
        ignore: Stored value or colour where nothing is asked.
        where: What messages call the set.

    Raises:
        ValueError: If they can be read in several ways.
    """
    if rule == "auto":
        return settle(looks_at(paths, ignore), where)
    return Reading(rule if isinstance(rule, str) else tuple(rule))


def looks_at(paths: Iterable[Path], ignore: int | Colour | None) -> list[Look]:
    """What up to 1,000 files contain that are spread over all of them."""
    some = list(paths)
    some = some[:: -(-len(some) // _LOOKED_AT) or 1]

    def look(path: Path) -> Look | None:
        try:
            return look_at(path, ignore)
        except ImageError:
            return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(look, some) if found is not None]


def look_at(path: Path, ignore: int | Colour | None = None) -> Look:
    """What a file contains, but for what is ignored.

    Raises:
        ImageError: If it cannot be read.
    """
    stored = _open(path)
    void = _ignored(stored, ignore)
    codes = stored.codes if void is None else stored.codes[~void]
    distinct = _distinct(codes)
    soft = sum(code < 0 for code in distinct) > _FEW and _one_hue(np.array(sorted(distinct)))
    see_through = False
    if stored.alpha is not None:
        see_through = bool((stored.alpha > 127).any() and (stored.alpha <= 127).any())
    return Look(
        path=path,
        codes=_brighter(distinct) if soft else distinct,
        soft=soft,
        lossy=stored.lossy,
        visible=None if stored.alpha is None else _visible(stored),
        see_through=see_through,
    )


def settle(looks: Sequence[Look], where: object) -> Reading:
    """How masks are read that contain such values together.

    Transparency decides where it alone varies. Two values, of which one is 0, are outside and
    inside, whatever the other one is or looks like. Grey masks whose borders are soft are read by
    half of their full range.

    Raises:
        ValueError: If they can be read in several ways.
    """
    if any(look.see_through for look in looks):
        return _by_alpha(looks, where)
    codes = frozenset[int]().union(*(look.codes for look in looks))
    if any(look.soft for look in looks):
        codes = _brighter(codes)
    values = _sorted(codes)
    grey = all(value >= 0 for value in values)
    deep = any(value > 255 for value in values)
    half = 32767 if deep else 127
    if len(values) <= 1:
        return Reading(tuple(_uncoded(value) for value in values if value), codes, settled=True)
    if len(values) == 2 and (values[0] == 0 or (grey and values[0] <= half < values[1])):
        return Reading((_uncoded(values[1]),), codes, settled=True)
    between = any(half < value < values[-1] for value in values)
    lossy = all(look.lossy for look in looks if len(look.codes) > 1)
    if grey and values[-1] > half and (lossy or (len(values) > 3 and between)):
        return Reading("half", settled=True, deep=deep)
    raise ValueError(f"data: {where}: {_undecided(values, looks, half)}")


def _by_alpha(looks: Sequence[Look], where: object) -> Reading:
    shown = frozenset[int]().union(*(look.visible or () for look in looks if look.see_through))
    for look in looks:
        if look.see_through and len(look.visible or ()) > 1:
            raise ValueError(
                f"data: {where}: both transparency and colour vary in {look.path}: data.mask=alpha "
                "takes what is not transparent, data.mask=half what is bright, "
                "data.mask=nonzero what is not black."
            )
    return Reading("alpha", shown, settled=True)


def _undecided(values: Sequence[int], looks: Sequence[Look], half: int) -> str:
    """Several ways to read masks, and how to choose one."""
    first: dict[int, Path] = {}
    for look in looks:
        for code in look.codes:
            first.setdefault(code, look.path)
    ways = []
    if len(values) == 2:
        ways = [f"data.mask={_listed(value)}" for value in values]
    elif len(values) == 3 and values[0] == 0:
        ways = [
            f"data.mask={_listed(value)} data.ignore={_listed(void)[1:-1]}"
            for value, void in ((values[1], values[2]), (values[2], values[1]))
        ]
    if values[0] == 0:
        ways.append("data.mask=nonzero (all that is not 0)")
    if all(value >= 0 for value in values):
        ways.append(f"data.mask=half (what is above {half})")
    if len(values) > 2 and values[0] == 0:
        ways.append("data.classes=..., if these are classes")
    return (
        f"binary masks have {_told(values)} (such as {first.get(values[-1], 'several files')}), "
        f"which can be read in several ways; choose one: {'; '.join(ways)}."
    )


def _sorted(codes: Iterable[int]) -> list[int]:
    """Grey levels, rising, and then colours."""
    return sorted(map(int, codes), key=lambda code: (code < 0, abs(code)))


def _distinct(codes: np.ndarray) -> frozenset[int]:
    """The values that occur; of very many some, the smallest and the largest among them."""
    flat = codes.ravel()
    if codes.dtype == np.uint8:
        found = np.flatnonzero(Image.fromarray(flat.reshape(1, -1)).histogram())
    elif flat.size and flat.min() >= 0 and flat.max() < 2**16:
        found = np.flatnonzero(np.bincount(flat))
    else:  # by counts, as NumPy sorts then, which is many times faster than its hashing
        found, _ = np.unique(flat, return_counts=True)
    if len(found) > _KEPT:
        found = found[np.linspace(0, len(found) - 1, _KEPT).astype(int)]
    return frozenset(found.tolist())


def _visible(stored: _Stored) -> frozenset[int]:
    """What is not transparent."""
    assert stored.alpha is not None
    return _distinct(stored.codes[stored.alpha > 127])


def _brightness(codes: np.ndarray) -> np.ndarray:
    """Grey levels as they are, of colours the largest of red, green and blue."""
    if codes.dtype.kind == "u" or not (codes < 0).any():
        return codes
    return np.asarray(np.where(codes < 0, _channels(codes).max(-1), codes))


def _brighter(codes: Iterable[int]) -> frozenset[int]:
    return frozenset(_brightness(np.array(sorted(codes), np.int64)).tolist())


def _among(codes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where [H, W] is one of some values."""
    if codes.dtype != np.uint8:
        return np.isin(codes, values)
    table = np.zeros(256, bool)
    table[[value for value in values if 0 <= value < 256]] = True
    return np.asarray(table[codes])


def _one_hue(codes: np.ndarray) -> bool:
    """Whether colours differ by little but their brightness."""
    levels = _brightness(codes)
    bright = levels > 127
    channels = np.where(codes[bright, None] < 0, _channels(codes[bright]), codes[bright, None])
    hues = channels * 255 // levels[bright, None]
    return bool(bright.any() and (np.ptp(hues, axis=0) <= _HUES).all())


def _channels(codes: np.ndarray) -> np.ndarray:
    """Red, green and blue [..., 3] of colours."""
    return np.asarray((-1 - codes)[..., None] >> np.array([16, 8, 0]) & 255)


def _code(value: int | Colour) -> int:
    """A number for what a pixel looks like: a grey level itself, a colour below 0."""
    if isinstance(value, int):
        return value
    red, green, blue = value
    return red if red == green == blue else -1 - (red << 16 | green << 8 | blue)


def _uncoded(code: int) -> int | Colour:
    if code >= 0:
        return code
    red, green, blue = _channels(np.array(code)).tolist()
    return red, green, blue


def _listed(code: int) -> str:
    value = _uncoded(code)
    return f"[{value}]" if isinstance(value, int) else f"[[{','.join(map(str, value))}]]"


def _told(codes: Iterable[int]) -> str:
    """Some values in words."""
    values = [_uncoded(code) for code in _sorted(codes)]
    shown = [
        str(value) if isinstance(value, int) else f"[{','.join(map(str, value))}]"
        for value in values[:12]
    ]
    more = [f"{len(values) - 12} more"] if len(values) > 12 else []
    *some, last = shown + more
    return f"{', '.join(some)} and {last}" if some else last


def _ignored(stored: _Stored, ignore: int | Colour | None) -> np.ndarray | None:
    if ignore is None:
        return None
    if isinstance(ignore, int):
        return np.asarray(stored.values == ignore)
    return np.asarray(stored.codes == _code(ignore))


def _open(path: Path) -> _Stored:
    # Masks are read as they are: `read_image` would turn palettes and 16 bits into colours.
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return _stored(path, image)
    except FileNotFoundError:
        raise ImageError(f"no such mask: {path}.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image.") from None
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise ImageError(f"{path} cannot be decoded ({str(error).splitlines()[0]}).") from None


def _stored(path: Path, image: Image.Image) -> _Stored:
    depth, lossy, raw = depth_of(image), image.format in _LOSSY, raw_mode(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P":
        return _of_palette(path, upright, lossy)
    alpha = None
    if upright.mode in ("1", "L", "F") or upright.mode.startswith("I"):
        greys = np.asarray(upright) if depth is None else stored_values(upright, depth)
        return _of_greys(path, greys, lossy, _UNSCALED.get(raw, 1))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        alpha = np.asarray(upright)[..., 3]
    codes = _codes(np.asarray(upright.convert("RGB")))
    return _Stored(path, codes, codes, alpha, lossy)


def _of_palette(path: Path, image: Image.Image, lossy: bool) -> _Stored:
    indices = np.asarray(image)
    colours = np.zeros((256, 3), np.uint8)
    listed = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colours[: len(listed)] = listed
    alpha = None
    if image.has_transparency_data:
        clear: Any = image.info["transparency"]
        table = np.full(256, 255, np.uint8)
        if isinstance(clear, bytes):
            table[: len(clear)] = list(clear)
        else:
            table[clear] = 0
        alpha = table[indices]
    return _Stored(path, indices, _codes(colours)[indices], alpha, lossy)


def _codes(colours: np.ndarray) -> np.ndarray:
    """What [..., 3] uint8 looks like: uint8 if all of it is grey."""
    red, green, blue = (colours[..., channel] for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    wide = colours.astype(np.int32)
    joined = -1 - (wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2])
    return np.where((red == green) & (red == blue), red, joined)


def _of_greys(path: Path, greys: np.ndarray, lossy: bool, scaled: int) -> _Stored:
    fractions = False
    if greys.dtype.kind == "f":
        greys = np.nan_to_num(greys)
        fractions = bool((greys % 1).any())
        if fractions and greys.max() <= 1:
            greys = greys * 255
        greys = np.rint(greys).astype(np.int32)
    elif greys.dtype == bool:
        greys = greys.astype(np.uint8)
    elif scaled > 1:  # Pillow spreads 2 and 4 bits over 8
        greys = greys // scaled
    if greys.min(initial=0) < 0:
        raise ImageError(f"{path} has values below 0, such as {greys.min()}.")
    return _Stored(path, greys, greys, None, lossy, fractions)
