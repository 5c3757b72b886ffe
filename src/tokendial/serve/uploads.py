"""From the bytes of a client to RGB images: bounded in bytes, pixels, number and time.

Nothing that a client sends is ever taken for a path or an address.
"""

import asyncio
from base64 import b64decode
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from tokendial.data.images import ImageError, TooManyPixelsError, decode_image
from tokendial.data.pixels import ValueRange
from tokendial.serve.problems import ProblemError, invalid
from tokendial.serve.schemas import Options, PredictBody
from tokendial.serve.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MOST_SCANS = 50
OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a request brought."""

    images: list[bytes | str]
    """Image files; text where they came as base64."""
    options: Options
    """What it asks for."""

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
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
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
        return _from_json(b"".join([chunk async for chunk in _chunks(request, settings)]), request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload([b"".join([chunk async for chunk in _chunks(request, settings)])], options)
    message = "Content-Type must be image/*, multipart/form-data or application/json."
    raise ProblemError(415, "unsupported_media_type", message, "Content-Type")


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


async def _from_form(request: Request, settings: Settings) -> list[bytes | str]:
    _, options = parse_options_header(request.headers["content-type"])
    files: list[bytes | str] = []
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


def _from_json(body: bytes, request: Request) -> Upload:
    if request.query_params:
        message = "The options of a JSON request are fields of its body."
        raise ProblemError(422, "invalid", message, next(iter(request.query_params))[:100])
    try:
        asked = PredictBody.model_validate_json(body)
    except ValidationError as error:
        problem = invalid(error.errors(include_url=False, include_context=False))
        broken = error.errors()[0]["type"] == "json_invalid"
        status, code = (400, "broken_json") if broken else (422, "invalid")
        raise ProblemError(status, code, problem.message, problem.field) from None
    return Upload(list(asked.images), asked)


def to_image(
    file: bytes | str, name: str, settings: Settings, value_range: ValueRange = None
) -> Image.Image:
    """Decode an image; for worker threads.

    Raises:
        ProblemError: If it is not an image of `FORMATS`, broken, or has too many pixels.
    """
    if isinstance(file, str):
        try:
            file = b64decode(file, validate=True)
        except ValueError:
            raise ProblemError(422, "not_base64", f"{name} is not base64.", name) from None
    # A progressive JPEG may go over all of its pixels a thousand times in a few kilobytes; honest
    # ones do so about ten times.
    if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda") > _MOST_SCANS:
        raise ProblemError(422, "not_an_image", f"{name} has more than {_MOST_SCANS} scans.", name)
    try:
        return decode_image(
            file,
            name,
            formats=FORMATS,
            max_pixels=settings.max_pixels,
            value_range=value_range,
        )
    except TooManyPixelsError as error:
        raise ProblemError(413, "too_many_pixels", str(error), name) from None
    except ImageError as error:
        raise ProblemError(422, "not_an_image", str(error), name) from None
