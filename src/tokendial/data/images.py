"""Reading images of every kind that people have on disk."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tokendial.data.files import files_in, find_files
from tokendial.data.pixels import RangeError, ValueRange, rgb_image
from tokendial.errors import one_line

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


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
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no such image: {path}.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty.")
    return _decoded(path, str(path), value_range=value_range)


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
        formats: Pillow's names of the formats that are tried; None: every one that it knows.
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
) -> Image.Image:
    try:
        # Pillow maps a file that it opens by its path into memory, and then mixes up the rows of a
        # TIFF that lies on its side.
        with (
            source.open("rb") if isinstance(source, Path) else source as file,
            Image.open(file, formats=formats) as image,
        ):
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise TooManyPixelsError(
                    f"{name} has {image.width} x {image.height} pixels, "
                    f"more than {max_pixels:,} in all."
                )
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
        raise ImageError(f"{name} cannot be decoded ({one_line(error)}).") from None


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files among `paths`; folders are searched through, sorted by name.

    Raises:
        ImageError: If a path does not exist, or nothing is found.
    """
    return find_files(paths, IMAGE_SUFFIXES, "image", ImageError)


def images_in(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted; told by their suffix."""
    return files_in(folder, IMAGE_SUFFIXES)
