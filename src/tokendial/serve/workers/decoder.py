"""Decoder processes from inside: `python -m tokendial.serve.workers.decoder`.

The first process loads the libraries and never reads a byte of a client. It forks the decoders, and
another one for each that ends. The kernel ends a decoder at its limits of processor time and
memory, whichever library it is in at that moment.
"""

import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
from base64 import b64decode, b64encode
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from tokendial.data.readers.images import ImageError, TooManyPixelsError, decode_image
from tokendial.data.readers.pixels import ValueRange
from tokendial.runs.mask_images import mask_image, mask_share
from tokendial.serve.problems import ProblemError
from tokendial.serve.workers.catalog import ServedModel
from tokendial.serve.workers.decoder_messages import (
    DecodeImage,
    DecoderFailed,
    ImageDecoded,
    ImageIsLarge,
    InvalidImage,
    MaskRendered,
    RenderMask,
    Reply,
)
from tokendial.tasks import BinaryMasks, Segmentation

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Image formats that the server accepts, by Pillow's names."""
QUICK_PIXELS = 1_000_000
"""An image with more pixels is not decoded by a quick `DecodeImage`."""
_MAX_SCANS = 50
"""A progressive JPEG of a few kilobytes can pass over its pixels a thousand times. Ordinary ones
have about ten scans."""
_STDIN = 0
_REPLY_TYPES: dict[str, TypeAdapter[Reply]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (ImageDecoded, ImageIsLarge, MaskRendered, InvalidImage, DecoderFailed)
}


def main(listener: socket.socket, count: int, memory: int) -> None:
    """Keep decoders running until the server closes the other end of stdin.

    Args:
        listener: Socket on which each decoder accepts a connection of the server.
        count: Number of decoders.
        memory: Bytes that a decoder may allocate beyond what it starts with.
    """
    # A service manager may send SIGTERM to every process of the service; the server obeys it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # memory that the garbage collector does not touch stays shared
    running = {_fork_decoder(listener, memory) for _ in range(count)}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            running.add(_fork_decoder(listener, memory))


def decode_base64(text: bytes, label: str) -> bytes:
    """Decode base64 as a JSON string holds it; raise a ProblemError if it is not base64."""
    try:
        unescaped = json.loads(b'"%b"' % text) if b"\\" in text else text
        return b64decode(unescaped, validate=True)
    except ValueError:
        raise ProblemError(422, "not_base64", f"{label} is not base64.", label) from None


def decode_upload(
    file: bytes, label: str, max_pixels: int, value_range: ValueRange = None
) -> Image.Image:
    """Decode an image of a client. There is no limit of time; the kernel sets it.

    Args:
        file: Any bytes.
        label: Name of the image in error messages.
        max_pixels: Maximum number of pixels, by the image's header.
        value_range: Values of black and white in files of more than 8 bits; see
            `tokendial.data.readers.pixels`.

    Raises:
        ProblemError: If it is no image of `FORMATS`, is damaged, or has too many pixels.
    """
    if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda") > _MAX_SCANS:
        message = f"{label} has more than {_MAX_SCANS} scans."
        raise ProblemError(422, "not_an_image", message, label)
    try:
        return decode_image(
            file, label, formats=FORMATS, max_pixels=max_pixels, value_range=value_range
        )
    except TooManyPixelsError as error:
        raise ProblemError(413, "too_many_pixels", str(error), label) from None
    except ImageError as error:
        raise ProblemError(422, "not_an_image", str(error), label) from None


def render_mask(model: ServedModel, logits: Tensor, size: tuple[int, int]) -> tuple[bytes, float]:
    """Make the mask of an image.

    Args:
        model: A model that gives masks.
        logits: Its logits, [K, h, w].
        size: Height and width of the mask, in pixels.

    Returns:
        A PNG file (probabilities as grey levels, or class indices with a palette), and the fraction
        of the pixels that lie inside, or have any class but the first.
    """
    if not isinstance(model.task, BinaryMasks | Segmentation):
        raise ValueError(f"model must give masks, its task is {type(model.task).__name__}.")
    mask = mask_image(model.task, logits, size)
    file = BytesIO()
    mask.save(file, format="PNG")
    return file.getvalue(), mask_share(model.task, mask)


def write_reply(reply: Reply) -> bytes:
    """Serialise a reply: the name of its type, a blank, and its fields in JSON."""
    name = type(reply).__name__
    return name.encode() + b" " + _REPLY_TYPES[name].dump_json(reply)


def read_reply(text: bytes) -> Reply:
    """Parse what `write_reply` has written."""
    name, _, fields = text.partition(b" ")
    return _REPLY_TYPES[name.decode()].validate_json(fields)


def _fork_decoder(listener: socket.socket, memory: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _limit_memory(memory)
        _serve(listener)
        code = 0
    finally:
        os._exit(code)


def _limit_memory(additional: int) -> None:
    # Where the system does not report the present size, only pixels are limited.
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + additional
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(listener: socket.socket) -> None:
    """Accept one connection, and answer its messages until it ends."""
    ready, _, _ = select.select([listener.fileno(), _STDIN], [], [])
    if _STDIN in ready:
        return
    accepted, _ = listener.accept()
    connection, models = Connection(accepted.detach()), dict[str, ServedModel]()
    with suppress(EOFError, ConnectionError):  # the server has ended
        while True:
            message: DecodeImage | RenderMask = pickle.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
            if message.model is not None:
                models[message.name] = message.model
            # The default action of SIGPROF, which this timer sends, ends the process.
            signal.setitimer(signal.ITIMER_PROF, message.cpu_limit_s)
            reply, body = _reply_to(message, models[message.name], payload)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(write_reply(reply))
            connection.send_bytes(body)


def _reply_to(
    message: DecodeImage | RenderMask, model: ServedModel, payload: bytes
) -> tuple[Reply, bytes]:
    """Carry out a message; return the reply and its payload."""
    try:
        if isinstance(message, RenderMask):
            values = torch.frombuffer(bytearray(payload), dtype=torch.float32)
            png, share = render_mask(model, values.view(message.logits_shape), message.size)
            return MaskRendered(share), b64encode(png)
        return _decode(message, model, payload)
    except ProblemError as error:
        return InvalidImage(error.status, error.problem), b""
    except Exception:
        return DecoderFailed(traceback.format_exc()), b""


def _decode(message: DecodeImage, model: ServedModel, payload: bytes) -> tuple[Reply, bytes]:
    began = time.monotonic()
    file = decode_base64(payload, message.label) if message.base64 else payload
    if message.quick and (pixels := _pixels_in_header(file)) > QUICK_PIXELS:
        return ImageIsLarge(min(pixels, message.max_pixels)), b""
    image = decode_upload(file, message.label, message.max_pixels, model.value_range)
    tensor = model.transform(image).contiguous()
    shape = tuple(tensor.shape)
    if shape != message.input_shape:
        raise ValueError(f"images must become {message.input_shape}, got {shape}.")
    seconds = time.monotonic() - began
    return ImageDecoded(shape, (image.height, image.width), seconds), tensor.numpy().tobytes()


def _pixels_in_header(file: bytes) -> int:
    """Number of pixels by the header of an image; 0 if it has no readable header."""
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # Pillow raises many types; decoding reports the problem
        return 0


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
