"""Read mask files as they are stored: grey levels, palette indices, colours and transparency.

`readers.images.read_image` cannot be used for masks: it would convert palettes and 16 bits to RGB.
"""

# Shape legend: H and W pixels.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokendial.data.readers.colour_codes import Colour, distinct_codes, encode, encode_pixels
from tokendial.data.readers.images import ImageError
from tokendial.data.readers.pixels import depth_of, raw_mode, stored_values

IGNORED = 255
"""Value of a mask, once it is read, at pixels that count neither in the loss nor in the metrics."""
_LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "WEBP")
# Pillow stretches 2-bit and 4-bit grey levels to 8 bits by these factors.
_PILLOW_FACTORS = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True, slots=True)
class MaskFile:
    """Content of a mask file, turned upright by its EXIF orientation."""

    path: Path
    """The file."""
    values: np.ndarray
    """Stored values [H, W]: palette indices for files with a palette, else the same as `codes`."""
    codes: np.ndarray
    """Visible grey levels and colours [H, W], as integers of `readers.colour_codes`."""
    alpha: np.ndarray | None
    """Opacity [H, W] uint8; None if the file has no transparency."""
    is_lossy: bool
    """Whether the file format changes values slightly, as JPEG does."""
    has_fractions: bool = False
    """Whether the file stores numbers that are not whole."""

    def visible_codes(self) -> frozenset[int]:
        """Return the codes of the pixels that are not transparent; the file must have alpha."""
        assert self.alpha is not None
        return distinct_codes(self.codes[self.alpha > 127])

    def is_ignored(self, ignore: int | Colour | None) -> np.ndarray | None:
        """Return where the mask has the ignored value or colour, bool [H, W]; None if none is."""
        if ignore is None:
            return None
        if isinstance(ignore, int):
            return np.asarray(self.values == ignore)
        return np.asarray(self.codes == encode(ignore))


def open_mask(path: Path) -> MaskFile:
    """Read a mask file.

    Raises:
        ImageError: If the file is missing, is not an image, cannot be decoded, or holds values
            below 0.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return _read(path, image)
    except FileNotFoundError:
        raise ImageError(f"no such mask: {path}.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image.") from None
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise ImageError(f"{path} cannot be decoded ({str(error).splitlines()[0]}).") from None


def _read(path: Path, image: Image.Image) -> MaskFile:
    # These three are known before the image is loaded only.
    depth, is_lossy, raw = depth_of(image), image.format in _LOSSY_FORMATS, raw_mode(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P":
        return _read_palette(path, upright, is_lossy)
    alpha = None
    if upright.mode in ("1", "L", "F") or upright.mode.startswith("I"):
        greys = np.asarray(upright) if depth is None else stored_values(upright, depth)
        return _read_greys(path, greys, is_lossy, _PILLOW_FACTORS.get(raw, 1))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        alpha = np.asarray(upright)[..., 3]
    codes = encode_pixels(np.asarray(upright.convert("RGB")))
    return MaskFile(path, codes, codes, alpha, is_lossy)


def _read_palette(path: Path, image: Image.Image, is_lossy: bool) -> MaskFile:
    indices = np.asarray(image)
    colours = np.zeros((256, 3), np.uint8)
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colours[: len(palette)] = palette
    alpha = None
    if image.has_transparency_data:
        # Either one opacity for each palette index, or the single index that is transparent.
        transparency: Any = image.info["transparency"]
        opacity = np.full(256, 255, np.uint8)
        if isinstance(transparency, bytes):
            opacity[: len(transparency)] = list(transparency)
        else:
            opacity[transparency] = 0
        alpha = opacity[indices]
    return MaskFile(path, indices, encode_pixels(colours)[indices], alpha, is_lossy)


def _read_greys(path: Path, greys: np.ndarray, is_lossy: bool, pillow_factor: int) -> MaskFile:
    has_fractions = False
    if greys.dtype.kind == "f":
        greys = np.nan_to_num(greys)
        has_fractions = bool((greys % 1).any())
        if has_fractions and greys.max() <= 1:
            greys = greys * 255
        greys = np.rint(greys).astype(np.int32)
    elif greys.dtype == bool:
        greys = greys.astype(np.uint8)
    elif pillow_factor > 1:
        greys = greys // pillow_factor
    if greys.min(initial=0) < 0:
        raise ImageError(f"{path} has values below 0, such as {greys.min()}.")
    return MaskFile(path, greys, greys, None, is_lossy, has_fractions)
