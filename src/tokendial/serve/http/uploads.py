"""From the bytes of a client to RGB images: bounded in bytes, pixels, number and time.

Nothing that a client sends is ever taken for a path or an address.
"""

import asyncio
import json
from base64 import b64decode
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from tokendial.data.readers.images import ImageError, TooManyPixelsError, decode_image
from tokendial.data.readers.pixels import ValueRange
from tokendial.serve.http.problems import ProblemError, invalid
from tokendial.serve.http.schemas import Options, PredictBody
from tokendial.serve.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MOST_SCANS = 50
# Of JSON: options beside the images, and what is no text: braces, names, blanks.
_MOST_TEXTS = 16
_MOST_SKELETON, _SKELETON_OF_AN_IMAGE = 2048, 64
_SHORT = 1200
"""Bytes of the longest text that is no image: a model's name of 100 letters, all escaped."""
_MOST_QUOTES = 100
"""Quotes inside of a text, and backslashes before a quote: base64 has none."""
_MOST_CONTENT_TYPE = 256
OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a request brought."""

    images: Sequence[bytes | memoryview]
    """Image files, or their base64 as JSON holds it."""
    options: Options
    """What it asks for."""
    base64: bool = False
    """Whether images are base64."""

    def name(self, index: int) -> str:
        """What errors call an image."""
        return f"images[{index}]"


async def receive(request: Request, options: Options, settings: Settings) -> Upload:
    """Read a request: a raw image, a form with several, or JSON.

    Args:
        request: Nothing of its body has been read yet.
        options: Its query parameters.
        settings: The limits.

    Raises:
        ProblemError: If it is too large, too slow, of another kind, or broken.
    """
    kind = request.headers.get("content-type", "")
    if len(kind) > _MOST_CONTENT_TYPE:
        raise _other_kind()
    kind = kind.partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(settings.timeout_s):
            upload = await _read(kind, request, options, settings)
    except TimeoutError:
        message = f"The request was not there after {settings.timeout_s:g} seconds."
        raise ProblemError(408, "timeout", message, headers={"connection": "close"}) from None
    if not upload.images:
        raise ProblemError(422, "no_images", "The request holds no image.", "images")
    if len(upload.images) > settings.max_images:
        raise _too_many_images(settings)
    return upload


def _too_many_images(settings: Settings) -> ProblemError:
    message = f"At most {settings.max_images} images go into a request."
    return ProblemError(413, "too_many_images", message, "images")


async def _read(kind: str, request: Request, options: Options, settings: Settings) -> Upload:
    if kind == "multipart/form-data":
        return Upload(await _from_form(request, settings), options)
    if kind == "application/json":
        body = b"".join([chunk async for chunk in _chunks(request, settings)])
        return _from_json(body, request, settings.max_images)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload([b"".join([chunk async for chunk in _chunks(request, settings)])], options)
    raise _other_kind()


def _other_kind() -> ProblemError:
    message = "Content-Type must be image/*, multipart/form-data or application/json."
    return ProblemError(415, "unsupported_media_type", message, "Content-Type")


async def _chunks(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; ends with an error as soon as there is too much of it."""
    told = request.headers.get("content-length", "")
    too_large = ProblemError(
        413, "too_large", f"A request may have at most {settings.max_bytes:,} bytes."
    )
    if told.isdecimal() and float(told) > settings.max_bytes:
        raise too_large
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > settings.max_bytes:
            raise too_large
        yield chunk


async def _from_form(request: Request, settings: Settings) -> list[bytes]:
    _, options = parse_options_header(request.headers["content-type"])
    files: list[bytes] = []
    ended = asyncio.Event()

    def take(part: File) -> None:
        if part.field_name != b"images":
            refuse(part)
        if len(files) == settings.max_images:
            raise _too_many_images(settings)
        part.file_object.seek(0)
        files.append(part.file_object.read())

    def refuse(part: File | Field) -> None:
        name = (part.field_name or b"").decode(errors="replace")
        message = "Each part of the form must be a file named images."
        raise ProblemError(422, "invalid", message, name[:100])

    # All that a request may bring fits into memory: nothing is ever written to a file.
    config = {"MAX_MEMORY_FILE_SIZE": settings.max_bytes}
    try:
        parser = FormParser(
            "multipart/form-data", refuse, take, ended.set, options.get(b"boundary"), config=config
        )
        async for chunk in _chunks(request, settings):
            parser.write(chunk)
    except FormParserError:
        raise ProblemError(400, "broken_form", "The form cannot be read.") from None
    if not ended.is_set():
        raise ProblemError(400, "broken_form", "The form has no end.")
    return files


def _from_json(body: bytes, request: Request, most: int) -> Upload:
    """Take a body apart in the time of a few searches through it, whatever it holds.

    Checking values costs microseconds and hundreds of bytes for each: it has to know first that
    there are few. Texts of images are not looked at here.
    """
    if request.query_params:
        message = "The options of a JSON request are fields of its body."
        raise ProblemError(422, "invalid", message, next(iter(request.query_params))[:100])
    skeleton, texts = _skeleton(body, most)
    try:
        found, told = json.loads(skeleton), [_short(text) for text in texts]
    except (ValueError, RecursionError):
        raise ProblemError(400, "broken_json", "The body is not JSON.") from None
    if isinstance(found, dict):
        found = {
            told[int(name)]: told[int(value)] if isinstance(value, str) else value
            for name, value in found.items()
        }
        for name in found:
            if name not in PredictBody.model_fields:
                raise ProblemError(422, "invalid", "There is no such field.", name[:100])
    try:
        asked = PredictBody.model_validate(found)
    except ValidationError as error:
        problem = invalid(error.errors(include_url=False, include_context=False))
        raise ProblemError(422, "invalid", problem.message, problem.field) from None
    return Upload([texts[int(number)] for number in asked.images], asked, base64=True)


def _skeleton(body: bytes, most_images: int) -> tuple[bytes, list[memoryview]]:
    """JSON with a number in the place of each text, and the texts between their quotes."""
    most_texts = most_images + _MOST_TEXTS
    most_bytes = _MOST_SKELETON + _SKELETON_OF_AN_IMAGE * most_images
    seen, skeleton, texts, at = memoryview(body), b"", list[memoryview](), 0
    while True:
        begin = body.find(b'"', at)
        between = seen[at:] if begin < 0 else seen[at:begin]
        if len(skeleton) + len(between) > most_bytes or len(texts) > most_texts:
            message = (
                f"A JSON body has at most {most_images} images, and the options: it holds more "
                f"than {most_texts} texts, or {most_bytes} bytes beside them."
            )
            raise ProblemError(413, "too_many_values", message)
        skeleton += between
        if begin < 0:
            return skeleton, texts
        skeleton += b'"%d"' % len(texts)
        end = _end_of_text(body, begin + 1)
        texts.append(seen[begin + 1 : end])
        at = end + 1


def _end_of_text(body: bytes, begin: int) -> int:
    """Where the quote stands that ends a text of JSON."""
    at = begin
    for _ in range(_MOST_QUOTES):
        at = body.find(b'"', at)
        before = body[max(begin, at - _MOST_QUOTES) : at]
        escapes = len(before) - len(before.rstrip(b"\\"))
        if at < 0 or escapes == _MOST_QUOTES:
            break
        if escapes % 2 == 0:
            return at
        at += 1
    raise ProblemError(400, "broken_json", "The body is not JSON: a text has no end.")


def _short(text: memoryview) -> str:
    """A text of JSON, or its beginning where it is longer than any that is allowed."""
    if len(text) > _SHORT:
        return bytes(text[:_SHORT]).decode(errors="replace")
    decoded: str = json.loads(b'"%b"' % bytes(text))
    return decoded.encode(errors="replace").decode()  # JSON may hold halves of letters


def file_of(base64: bytes, name: str) -> bytes:
    """An image file of its base64, as JSON holds it; a ProblemError if it is none."""
    try:
        text = json.loads(b'"%b"' % base64) if b"\\" in base64 else base64
        return b64decode(text, validate=True)
    except ValueError:
        raise ProblemError(422, "not_base64", f"{name} is not base64.", name) from None


def pixels_of(file: bytes) -> int:
    """Of an image, by its header; 0 if it has none that can be read."""
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # Pillow raises what it pleases; whoever decodes it is told what is wrong
        return 0


def to_image(
    file: bytes, name: str, max_pixels: int, value_range: ValueRange = None
) -> Image.Image:
    """Decode an image; takes as long as a client likes.

    Args:
        file: Any bytes.
        name: What errors call it.
        max_pixels: By its header.
        value_range: What is black and white in files of more than 8 bits, see `data.pixels`.

    Raises:
        ProblemError: If it is not an image of `FORMATS`, broken, or has too many pixels.
    """
    # A progressive JPEG may go over all of its pixels a thousand times in a few kilobytes; honest
    # ones do so about ten times.
    if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda") > _MOST_SCANS:
        raise ProblemError(422, "not_an_image", f"{name} has more than {_MOST_SCANS} scans.", name)
    try:
        return decode_image(
            file, name, formats=FORMATS, max_pixels=max_pixels, value_range=value_range
        )
    except TooManyPixelsError as error:
        raise ProblemError(413, "too_many_pixels", str(error), name) from None
    except ImageError as error:
        raise ProblemError(422, "not_an_image", str(error), name) from None
