"""Reading images of every kind that people have on disk."""

import logging
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError, features

from tokendial.data.readers.files import files_in, find_files
from tokendial.data.readers.pixels import RangeError, ValueRange, rgb_image
from tokendial.errors import error_message

# Pillow reads more than these, some of it by other programs (EPS by Ghostscript) or as what is no
# picture (PDF, fonts). Pillow's wheels hold AVIF since 11.3; other builds may lack these codecs.
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
"""Pillow's names of the formats that are read, whatever a file's ending; TGA, which has no
signature, is tried last."""
IMAGE_SUFFIXES = frozenset().union(*_SUFFIXES.values())
"""Endings, in lower case, of the files that are looked for in folders."""
_SEVERAL = frozenset({"AVIF", "GIF", "PNG", "TIFF", "WEBP"})
_LOG = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line that names the file."""


class TooManyPixelsError(ImageError):
    """An image that is larger than is allowed; told by its header, before it is decoded."""


def read_image(path: str | Path, value_range: ValueRange = None) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Transparent pixels lie on white, CMYK, palette and grey images are converted, and the
    orientation that a camera noted is applied.

    Args:
        path: The file.
        value_range: What is black and white in files of more than 8 bits, see `data.pixels`.

    Raises:
        ImageError: If the file is missing, not an image, truncated, or too large to be sane, or
            nothing says what is black and white.
    """
    return _read(Path(path), value_range)


def check_image(path: Path, value_range: ValueRange = None) -> None:
    """Raise the ImageError that `read_image` would, in a third of the time or less for JPEGs.

    All of the data is decoded, but a JPEG's pixels are made at an eighth of its size.

    Args:
        path: The file.
        value_range: As `read_image` takes it.
    """
    _read(path, value_range, smallest=True)


def _read(path: Path, value_range: ValueRange, *, smallest: bool = False) -> Image.Image:
    if not path.is_file():
        raise ImageError(f"no such image: {path}.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty.")
    return _decoded(path, str(path), value_range=value_range, smallest=smallest)


def decode_image(
    data: bytes,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    value_range: ValueRange = None,
) -> Image.Image:
    """Read an image that lies inside another file, as `read_image` does; `name` tells where.

    Args:
        data: The bytes of the image file.
        name: What errors call it.
        formats: Pillow's names of the formats that are tried; None: `IMAGE_FORMATS`.
        max_pixels: Most pixels, read from the header before anything is decoded; None: what
            Pillow takes for sane.
        value_range: What is black and white in files of more than 8 bits, see `data.pixels`.

    Raises:
        TooManyPixelsError: If it has more pixels than that.
        ImageError: If it is not an image of these formats, or truncated.
    """
    if not data:
        raise ImageError(f"{name} is empty.")
    return _decoded(BytesIO(data), name, formats, max_pixels, value_range)


def _decoded(
    source: Path | BytesIO,
    name: str,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    value_range: ValueRange = None,
    *,
    smallest: bool = False,
) -> Image.Image:
    try:
        # Pillow maps a file that it opens by its path into memory, and then mixes up the rows of a
        # TIFF that lies on its side.
        with (
            source.open("rb") if isinstance(source, Path) else source as file,
            Image.open(file, formats=formats or IMAGE_FORMATS) as image,
        ):
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise TooManyPixelsError(
                    f"{name} has {image.width} x {image.height} pixels, "
                    f"more than {max_pixels:,} in all."
                )
            if smallest:
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
    # Pillow's decoders raise what they please on broken data; all of it means the same here, and
    # so do their warnings where the caller has made these errors.
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded ({error_message(error)}).") from None


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files among `paths`; folders are searched through, sorted by name.

    Raises:
        ImageError: If a path does not exist, or nothing is found.
    """
    return find_files(paths, IMAGE_SUFFIXES, "image", ImageError)


def images_in(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Image files anywhere below `folder`, sorted; `others` counts the endings of other files."""
    return files_in(folder, IMAGE_SUFFIXES, others)


def count_pictures(path: Path) -> int:
    """How many pictures a file holds: pages of a TIFF, frames of an animation.

    1 for files that cannot be read, and for photographs of phones (MPO), which hold smaller copies
    or other views of the same picture.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1) if image.format in _SEVERAL else 1
    except Exception:  # decoders raise what they please on broken data
        return 1


def warn_of_several(counts: Iterable[tuple[Path, int]]) -> None:
    """Log in one line which files hold several pictures, of which the first one is read.

    Args:
        counts: Files, and how many pictures each holds.
    """
    if several := [(path, count) for path, count in counts if count > 1]:
        (path, count), more = several[0], len(several) - 1
        and_more = f" (and {more:,} more such file(s))" if more else ""
        _LOG.warning("%s holds %d pictures, the first one is read%s", path, count, and_more)
