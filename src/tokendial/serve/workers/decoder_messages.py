"""Messages between the server and decoder processes.

Each message to a decoder is followed by a payload, the bytes it is about, and so is each reply.
Messages to decoders are pickled. Replies are JSON: a decoder handles bytes of clients, and
unpickling what it sends would give a client that takes it over the server as well.
"""

from dataclasses import dataclass

from tokendial.serve.problems import Problem
from tokendial.serve.workers.catalog import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeImage:
    """Decode an image and turn it into a model's input. The payload is the file."""

    name: str
    """Name of the model."""
    model: ServedModel | None
    """Description of the model; None if the decoder knows it from an earlier message."""
    label: str
    """Name of the image in error messages."""
    base64: bool
    """Whether the file is encoded as base64."""
    max_pixels: int
    """Maximum number of pixels of the image."""
    input_shape: tuple[int, ...]
    """Shape of the model's input for one image, [3, H, W]."""
    cpu_limit_s: float
    """Processor seconds after which the system ends the decoder."""
    quick: bool = False
    """Whether a large image shall not be decoded; the reply is then `ImageIsLarge`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderMask:
    """Make the mask of an image from its logits. The payload is the logits, in float32."""

    name: str
    """Name of the model."""
    model: ServedModel | None
    """Description of the model; None if the decoder knows it from an earlier message."""
    logits_shape: tuple[int, ...]
    """Shape of the logits, [K, h, w]."""
    size: tuple[int, int]
    """Height and width of the image, in pixels."""
    cpu_limit_s: float
    """Processor seconds after which the system ends the decoder."""
    label: str = "the mask"
    """Name of the mask in error messages."""


@dataclass(frozen=True, slots=True)
class ImageDecoded:
    """Reply to `DecodeImage`. The payload is the model's input, in float32."""

    shape: tuple[int, ...]
    """Shape of the input, [3, H, W]."""
    size: tuple[int, int]
    """Height and width of the image, in pixels."""
    seconds: float
    """Seconds that decoding took."""


@dataclass(frozen=True, slots=True)
class ImageIsLarge:
    """Reply to a quick `DecodeImage` whose image has too many pixels. No payload."""

    pixels: int
    """Number of pixels of the image, at most the allowed one."""


@dataclass(frozen=True, slots=True)
class MaskRendered:
    """Reply to `RenderMask`. The payload is base64 of a PNG."""

    share: float
    """Fraction of the pixels that lie inside the mask, or have any class but the first."""


@dataclass(frozen=True, slots=True)
class InvalidImage:
    """Reply if the image cannot be used. No payload."""

    status: int
    """HTTP status for the client."""
    problem: Problem
    """Error for the client."""


@dataclass(frozen=True, slots=True)
class DecoderFailed:
    """Reply if decoding failed through no fault of the client. No payload."""

    traceback: str
    """Stack trace, for the log."""


Reply = ImageDecoded | ImageIsLarge | MaskRendered | InvalidImage | DecoderFailed
