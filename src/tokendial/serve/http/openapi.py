"""Parts of the OpenAPI description that several routes share."""

from typing import Any

from tokendial.serve.http.schemas import Failure
from tokendial.serve.workers.decoder import FORMATS

_DESCRIPTIONS = {
    400: "The body is broken.",
    401: "An API key is needed.",
    403: "The request comes from a page of another site.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "Too many bytes, values, images or pixels, or too much work to decode.",
    415: "The body has a type that is not accepted.",
    421: "The header Host is not a name of this server.",
    422: "A value is not allowed, or there is no image.",
    429: "Too many images wait; the header Retry-After says when to try again.",
    503: "The deadline cannot be met, or the server stops; Retry-After says when to try again.",
}
_ON_EVERY_PATH = (403, 421)
_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "properties": {"images": {"type": "array", "items": _FILE, "minItems": 1}},
    "required": ["images"],
    "additionalProperties": False,
}
IMAGE_BODIES: dict[str, Any] = {f"image/{kind.lower()}": {"schema": _FILE} for kind in FORMATS}
"""Bodies with images, by content type."""
IMAGE_BODIES |= {"application/octet-stream": {"schema": _FILE}}
IMAGE_BODIES |= {"multipart/form-data": {"schema": _FORM}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error responses of a path, for the OpenAPI description."""
    return {
        status: {"model": Failure, "description": _DESCRIPTIONS[status]}
        for status in sorted({*statuses, *_ON_EVERY_PATH})
    }
