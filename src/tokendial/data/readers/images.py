"""Find image files and read them as 8-bit RGB."""

import logging
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError, features

from tokendial.data.readers.files import find_files, format_more, list_files
from tokendial.data.readers.pixels import RangeError, ValueRange, rgb_image
from tokendial.errors import error_message

# Pillow reads more formats than these. Some need other programs (EPS needs Ghostscript), some are
# not pictures (PDF, fonts). Pillow's wheels include AVIF since 11.3; other builds may lack it.
_SUFFIXES = {
    "JPEG": {".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"},
    "PNG": {".apng", ".png"},
    "WEBP": {".webp"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".pbm", ".pgm", ".pnm", ".ppm"},
    **({"AVIF": {".avif"}} if find_spec("PIL._avif") else {}),
    **({"JPEG2000": {".j2k", ".jp2", ".jpx"}} if features.check_codec("jpg_2000") else {}),
    "TGA": {".tga"},
}
IMAGE_FORMATS = tuple(_SUFFIXES)
"""Pillow's names of the formats that are read, whatever the ending of a file. TGA has no signature,
so it is tried last."""
IMAGE_SUFFIXES = frozenset().union(*_SUFFIXES.values())
"""Endings, in lower case, of the files that are found in folders."""
_MULTI_PICTURE_FORMATS = frozenset({"AVIF", "GIF", "PNG", "TIFF", "WEBP"})
_ORIENTATION = 0x0112  # EXIF tag
_SWAPS_SIDES = (5, 6, 7, 8)  # orientations that exchange width and height
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # TIFF tags
_LOG = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image file cannot be used; the message is one line that names the file."""


class TooManyPixelsError(ImageError):
    """An image has more pixels than allowed; its header says so, and nothing was decoded."""


def read_image(path: str | Path, value_range: ValueRange = None) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright.

    Transparent pixels become white, as if the image lay on white paper. CMYK, palette and grey
    images are converted, and the EXIF orientation is applied.

    Args:
        path: The image file.
        value_range: Values that become black and white in images of more than 8 bits; see
            `readers.pixels.ValueRange`.

    Raises:
        ImageError: If the file is missing, is not an image, is truncated, has more pixels than
            Pillow allows, or needs a value range and none is given.
    """
    return _read(Path(path), value_range)


def check_image(path: Path, value_range: ValueRange = None) -> None:
    """Raise the ImageError that `read_image` would raise; for JPEGs in a third of the time or less.

    All data of the file is decoded. The pixels of a JPEG are computed at an eighth of its size.

    Args:
        path: The image file.
        value_range: The same as for `read_image`.
    """
    _read(path, value_range, reduced_size=True)


def _read(path: Path, value_range: ValueRange, *, reduced_size: bool = False) -> Image.Image:
    if not path.is_file():
        raise ImageError(f"no such image: {path}.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty.")
    return _decode(path, str(path), value_range=value_range, reduced_size=reduced_size)


def decode_image(
    data: bytes,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    value_range: ValueRange = None,
) -> Image.Image:
    """Read an image from bytes as 8-bit RGB, turned upright, as `read_image` does for files.

    Args:
        data: Content of an image file.
        name: Name of the image in error messages, such as "images[0]".
        formats: Pillow's names of the allowed formats; None means `IMAGE_FORMATS`.
        max_pixels: Largest allowed number of pixels. It is compared with the header before anything
            is decoded. None means Pillow's own limit.
        value_range: Values that become black and white in images of more than 8 bits; see
            `readers.pixels.ValueRange`.

    Raises:
        TooManyPixelsError: If the image has more pixels than allowed.
        ImageError: If `data` is empty, is not an image of these formats, or is truncated.
    """
    if not data:
        raise ImageError(f"{name} is empty.")
    return _decode(BytesIO(data), name, formats, max_pixels, value_range)


def _decode(
    source: Path | BytesIO,
    name: str,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    value_range: ValueRange = None,
    *,
    reduced_size: bool = False,
) -> Image.Image:
    try:
        # Given a path, Pillow memory-maps the file, and then scrambles the rows of a TIFF whose
        # orientation tag says that it is rotated. Given an open file, it does not.
        with (
            source.open("rb") if isinstance(source, Path) else source as file,
            Image.open(file, formats=formats or IMAGE_FORMATS) as image,
        ):
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise TooManyPixelsError(
                    f"{name} has {image.width} x {image.height} pixels, "
                    f"more than {max_pixels:,} in all."
                )
            if reduced_size:
                image.draft(image.mode, (1, 1))
            return rgb_image(image, value_range)
    except ImageError:
        raise
    except RangeError as error:
        raise ImageError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise TooManyPixelsError(
            f"{name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, "
            f"as decompression bombs have."
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image.") from None
    # On broken data, Pillow's decoders raise exceptions of many types, and warnings that the caller
    # may have turned into errors. All mean that the file cannot be decoded.
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded ({error_message(error)}).") from None


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the image files in `paths` and, sorted by path, those in the folders in `paths`.

    Raises:
        ImageError: If a path does not exist or no image is found.
    """
    return find_files(paths, IMAGE_SUFFIXES, "image", ImageError)


def list_images(folder: Path, other_suffixes: Counter[str] | None = None) -> list[Path]:
    """Return the image files below `folder`, sorted by path.

    Args:
        folder: Folder to search recursively.
        other_suffixes: Counter to which the endings of all other files are added.
    """
    return list_files(folder, IMAGE_SUFFIXES, other_suffixes)


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image after its EXIF orientation; reads the header only.

    Raises:
        OSError: If the file cannot be read or is not an image. Pillow may also raise a SyntaxError
            or a ValueError for a broken header.
    """
    with Image.open(path) as image:
        size = image.size
        is_rotated = image.getexif().get(_ORIENTATION) in _SWAPS_SIDES
        tags = getattr(image, "tag_v2", None)
        # For TIFF, newer releases of Pillow give the upright size themselves.
        if tags is not None and size != (tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]):
            return size
        return size[::-1] if is_rotated else size


def count_pictures(path: Path) -> int:
    """Return the number of pictures in a file: pages of a TIFF, frames of an animation.

    It is 1 for files that cannot be read, and for photos of phones (MPO), in which the other
    pictures are smaller copies or other views of the first.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1) if image.format in _MULTI_PICTURE_FORMATS else 1
    except Exception:  # broken data; see the end of `_decode`
        return 1


def warn_of_multi_picture_files(counts: Iterable[tuple[Path, int]]) -> None:
    """Log in one line which files hold several pictures; only the first picture of a file is read.

    Args:
        counts: Files and the number of pictures in each.
    """
    if several := [(path, count) for path, count in counts if count > 1]:
        path, count = several[0]
        more = format_more(len(several) - 1, "such file")
        _LOG.warning("%s holds %d pictures, the first one is read%s", path, count, more)
