"""Reading a request: its images and options, within limits of bytes, number and time.

Nothing that a client sends is taken for a path or an address.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import ValidationError
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from tokendial.serve.http.errors import validation_problem
from tokendial.serve.http.schemas import ComputeOptions, EmbeddingBody, PredictBody
from tokendial.serve.problems import ProblemError
from tokendial.serve.settings import Settings

# Limits of a JSON body. Its "skeleton" is the body without the contents of its strings.
_MAX_EXTRA_STRINGS = 16
"""Maximum number of strings beside the images: names and values of options."""
_MAX_SKELETON_BYTES, _SKELETON_BYTES_PER_IMAGE = 2048, 64
_MAX_OPTION_BYTES = 1200
"""Bytes of the longest string that is no image: a model's name of 100 letters, all escaped."""
_MAX_QUOTES = 100
"""Maximum number of quotes inside a string, and of backslashes before a quote. Base64 has none."""
_MAX_CONTENT_TYPE_LENGTH = 256
_MAX_ECHO = 100
"""Characters of a client's text that an error repeats."""


Body = type[PredictBody] | type[EmbeddingBody]
"""What a JSON body of a request holds."""
OptionsT = TypeVar("OptionsT", bound=ComputeOptions)


@dataclass(frozen=True, slots=True)
class Upload(Generic[OptionsT]):
    """Content of a request."""

    images: Sequence[bytes | memoryview]
    """Image files, or their base64 as a JSON string holds it."""
    options: OptionsT
    """Options of the request."""
    base64: bool = False
    """Whether the images are base64."""


async def read_upload(
    request: Request, options: OptionsT, body: Body, settings: Settings, *, max_images: int
) -> Upload[OptionsT]:
    """Read a request: one image, a form with several images, or JSON.

    Args:
        request: The request; nothing of its body has been read yet.
        options: Its query parameters.
        body: What a JSON body holds: the fields of `options`, and images.
        settings: Limits of bytes and time.
        max_images: Maximum number of images.

    Raises:
        ProblemError: If the request is too large, too slow, of an unknown type, or broken.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > _MAX_CONTENT_TYPE_LENGTH:
        raise _content_type_error()
    content_type = content_type.partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(settings.timeout_s):
            upload = await _read(content_type, request, options, body, settings, max_images)
    except TimeoutError:
        message = f"The request had not arrived after {settings.timeout_s:g} seconds."
        raise ProblemError(408, "timeout", message, headers={"connection": "close"}) from None
    if not upload.images:
        raise ProblemError(422, "no_images", "The request holds no image.", "images")
    if len(upload.images) > max_images:
        raise _too_many_images_error(max_images)
    return upload


async def _read(
    content_type: str,
    request: Request,
    options: OptionsT,
    body: Body,
    settings: Settings,
    max_images: int,
) -> Upload[OptionsT]:
    if content_type == "multipart/form-data":
        return Upload(await _read_form(request, settings, max_images), options)
    if content_type == "application/json":
        text = b"".join([chunk async for chunk in _chunks(request, settings)])
        return _parse_json(text, request, body, max_images)
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        return Upload([b"".join([chunk async for chunk in _chunks(request, settings)])], options)
    raise _content_type_error()


async def _chunks(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives; raise an error as soon as it is too large."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and float(announced) > settings.max_bytes:
        raise _too_large_error(settings)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > settings.max_bytes:
            raise _too_large_error(settings)
        yield chunk


async def _read_form(request: Request, settings: Settings, max_images: int) -> list[bytes]:
    _, options = parse_options_header(request.headers["content-type"])
    files: list[bytes] = []
    ended = asyncio.Event()

    def add_file(part: File) -> None:
        if part.field_name != b"images":
            refuse_field(part)
        if len(files) == max_images:
            raise _too_many_images_error(max_images)
        part.file_object.seek(0)
        files.append(part.file_object.read())

    def refuse_field(part: File | Field) -> None:
        name = (part.field_name or b"").decode(errors="replace")
        message = "Each part of the form must be a file named images."
        raise ProblemError(422, "invalid", message, name[:_MAX_ECHO])

    # A request fits into memory, so the parser never writes to a file.
    config = {"MAX_MEMORY_FILE_SIZE": settings.max_bytes}
    try:
        parser = FormParser(
            "multipart/form-data",
            refuse_field,
            add_file,
            ended.set,
            options.get(b"boundary"),
            config=config,
        )
        async for chunk in _chunks(request, settings):
            parser.write(chunk)
    except FormParserError:
        raise ProblemError(400, "broken_form", "The form cannot be read.") from None
    if not ended.is_set():
        raise ProblemError(400, "broken_form", "The form has no end.")
    return files


def _parse_json(text: bytes, request: Request, body: Body, max_images: int) -> Upload[Any]:
    """Parse a JSON body in the time of a few searches through it, whatever it holds.

    Parsing and validating JSON costs microseconds and hundreds of bytes per value. So the values
    are counted first: strings are cut out, and only the short rest is parsed. The strings of images
    are not even copied.
    """
    if request.query_params:
        message = "The options of a JSON request are fields of its body."
        raise ProblemError(422, "invalid", message, next(iter(request.query_params))[:_MAX_ECHO])
    skeleton, strings = _split_strings(text, max_images)
    try:
        found, options = json.loads(skeleton), [_decode_option(each) for each in strings]
    except (ValueError, RecursionError):
        raise ProblemError(400, "broken_json", "The body is not JSON.") from None
    if isinstance(found, dict):
        # Strings stand as numbers in the skeleton. At the top level they are options; in the list
        # of images they stay numbers.
        found = {
            options[int(name)]: options[int(value)] if isinstance(value, str) else value
            for name, value in found.items()
        }
        for name in found:
            if name not in body.model_fields:
                message = "There is no such field."
                raise ProblemError(422, "invalid", message, name[:_MAX_ECHO])
    try:
        parsed = body.model_validate(found)
    except ValidationError as error:
        problem = validation_problem(error.errors(include_url=False, include_context=False))
        raise ProblemError(422, "invalid", problem.message, problem.field) from None
    return Upload([strings[int(number)] for number in parsed.images], parsed, base64=True)


def _split_strings(body: bytes, max_images: int) -> tuple[bytes, list[memoryview]]:
    """Return JSON in which each string is replaced by its number, and the strings."""
    max_strings = max_images + _MAX_EXTRA_STRINGS
    max_bytes = _MAX_SKELETON_BYTES + _SKELETON_BYTES_PER_IMAGE * max_images
    view, skeleton, strings, at = memoryview(body), b"", list[memoryview](), 0
    while True:
        begin = body.find(b'"', at)
        between = view[at:] if begin < 0 else view[at:begin]
        if len(skeleton) + len(between) > max_bytes or len(strings) > max_strings:
            message = (
                f"A JSON body has at most {max_images} images, and the options: it holds more "
                f"than {max_strings} texts, or {max_bytes} bytes beside them."
            )
            raise ProblemError(413, "too_many_values", message)
        skeleton += between
        if begin < 0:
            return skeleton, strings
        skeleton += b'"%d"' % len(strings)
        end = _end_of_string(body, begin + 1)
        strings.append(view[begin + 1 : end])
        at = end + 1


def _end_of_string(body: bytes, begin: int) -> int:
    """Index of the quote that ends the JSON string which starts at `begin`."""
    at = begin
    for _ in range(_MAX_QUOTES):
        at = body.find(b'"', at)
        before = body[max(begin, at - _MAX_QUOTES) : at]
        backslashes = len(before) - len(before.rstrip(b"\\"))
        if at < 0 or backslashes == _MAX_QUOTES:
            break
        # A quote ends the string if the number of backslashes before it is even.
        if backslashes % 2 == 0:
            return at
        at += 1
    raise ProblemError(400, "broken_json", "The body is not JSON: a text has no end.")


def _decode_option(text: memoryview) -> str:
    """Decode a JSON string; of one that is longer than any option, only the beginning."""
    if len(text) > _MAX_OPTION_BYTES:
        return bytes(text[:_MAX_OPTION_BYTES]).decode(errors="replace")
    decoded: str = json.loads(b'"%b"' % bytes(text))
    return decoded.encode(errors="replace").decode()  # JSON can hold single surrogates


def _content_type_error() -> ProblemError:
    message = "Content-Type must be image/*, multipart/form-data or application/json."
    return ProblemError(415, "unsupported_media_type", message, "Content-Type")


def _too_large_error(settings: Settings) -> ProblemError:
    message = f"A request has at most {settings.max_bytes:,} bytes."
    return ProblemError(413, "too_large", message)


def _too_many_images_error(max_images: int) -> ProblemError:
    message = f"At most {max_images} images are allowed in a request."
    return ProblemError(413, "too_many_images", message, "images")
