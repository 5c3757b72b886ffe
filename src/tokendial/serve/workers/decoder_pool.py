"""A pool of decoder processes, and the queues of what they decode.

Bytes of a client can keep a library busy for any time, and Python's global interpreter lock with
it. So they are opened in another process, which the kernel ends at a limit of time and memory.

There are two queues. An image starts in the quick one, with a small limit of processor time. If it
turns out to be large or slow, it moves to the second queue with the full limit. One decoder never
takes from the second queue, so small images are decoded however many large ones wait. Within a
queue, requests take turns: the second image of a request comes after the first of all others.
"""

import contextlib
import heapq
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.serve.problems import ProblemError
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.settings import Settings
from tokendial.serve.workers.catalog import ServedModel
from tokendial.serve.workers.decoder import QUICK_PIXELS, read_reply
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

_log = logging.getLogger(__name__)
_QUICK_CPU_S = 0.15
"""Limit of processor seconds for an image in the quick queue."""
_BYTES_PER_PIXEL = 32
"""Maximum memory of decoding per pixel: floating-point images, or images with transparency."""
_BASE_BYTES = 256 * 2**20
"""Memory that a decoder may use in addition."""
_SMOOTHING = 0.1
"""Smoothing factor for the measured decoding time of quick images."""
_CONNECT_TIMEOUT_S = 120.0
"""Longest wait for a free decoder; decoders load their libraries when they start."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded image as the input of a model."""

    tensor: Tensor
    """Normalised image, [3, H, W]."""
    size: tuple[int, int]
    """Height and width of the image as it was sent, in pixels."""
    seconds: float
    """Seconds that decoding took."""


@dataclass(frozen=True, slots=True)
class EncodedMask:
    """A mask as it is sent to the client."""

    png: bytes
    """Base64 of a PNG file."""
    share: float
    """Fraction of the pixels that lie inside the mask, or have any class but the first."""


@dataclass(order=True, slots=True)
class _Job:
    """One message that waits for a decoder. Jobs are ordered by turn, then by number."""

    turn: float
    number: int
    message: DecodeImage | RenderMask = field(compare=False)
    model: ServedModel = field(compare=False)
    payload: Any = field(compare=False)
    deadline: float = field(compare=False)
    rank: int = field(compare=False)
    """Number of images of the same request that come before this one."""
    pixels: int = field(compare=False, default=0)
    """Pixels that count towards the limit of the second queue; 0: it is in the quick queue."""
    future: "Future[Any]" = field(compare=False, default_factory=Future)

    @property
    def quick(self) -> bool:
        """Whether it is the quick attempt to decode an image."""
        return isinstance(self.message, DecodeImage) and not self.pixels


class DecoderPool:
    """Decoder processes, and one thread for each that hands out jobs."""

    def __init__(self, settings: Settings) -> None:
        """Start the processes. They are ready some seconds later; jobs wait until then."""
        self._count, self._max_pixels = settings.decoders, settings.max_pixels
        self._changed = threading.Condition()
        self._quick: list[_Job] = []
        self._large: list[_Job] = []
        self._numbers, self._turns = itertools.count(), [0.0, 0.0]
        self._pixels = self._ahead = 0
        self._expected_s, self._closed = 0.0, False
        self._folder = tempfile.TemporaryDirectory(prefix="tokendial-")
        self._process = self._start_process()
        for index in range(self._count):
            takes_large = index > 0 or self._count == 1
            threading.Thread(
                target=self._work, args=[takes_large], name="tokendial-decoder", daemon=True
            ).start()

    @property
    def ahead(self) -> int:
        """Number of images that wait or are being decoded, without those known to be large."""
        return self._ahead

    @property
    def wait_s(self) -> float:
        """Expected seconds until a new image is decoded."""
        return self._ahead // self._count * self._expected_s

    def decode(
        self, message: DecodeImage, file: bytes | memoryview, *, rank: int, deadline: float
    ) -> "Future[PreparedImage]":
        """Decode an image and turn it into a model's input.

        Args:
            message: What to do, with the model's description and the full limit of time.
            file: The image file.
            rank: Number of images of the same request that come before this one.
            deadline: Time, by `time.monotonic`, after which decoding has no use.

        Returns:
            A future. It fails with a ProblemError if the file is not an acceptable image, and with
            a RequestRefusedError if its turn comes after the deadline.
        """
        return self._submit(message, file, rank=rank, deadline=deadline)

    def render(
        self, message: RenderMask, logits: Tensor, *, deadline: float
    ) -> "Future[EncodedMask]":
        """Make the mask of an image from its logits [K, h, w]; arguments as in `decode`."""
        height, width = message.size
        pixels = height * width
        pixels = min(pixels, self._max_pixels) if pixels > QUICK_PIXELS else 0
        payload = logits.float().contiguous().numpy().reshape(-1)
        return self._submit(message, payload, rank=0, deadline=deadline, pixels=pixels)

    def close(self) -> None:
        """End the processes. Jobs that wait fail with a RequestRefusedError."""
        with self._changed:
            self._closed = True
            left, self._quick, self._large = [*self._quick, *self._large], [], []
            self._changed.notify_all()
        for job in left:
            _fail(job, RequestRefusedError("draining", "the server is stopping.", 1.0))
        self._end_process()
        self._folder.cleanup()

    def _submit(
        self,
        message: DecodeImage | RenderMask,
        payload: Any,
        *,
        rank: int,
        deadline: float,
        pixels: int = 0,
    ) -> "Future[Any]":
        if message.model is None:
            raise ValueError("message.model must be the description of the model.")
        job = _Job(0, 0, message, message.model, payload, deadline, rank, pixels)
        self._put(job)
        return job.future

    def _put(self, job: _Job) -> None:
        """Put a job into its queue.

        Its turn is the turn that is being served now plus its rank. So the second image of a
        request comes after the first of all, and new requests, which start at the present turn
        and not at 0, cannot keep the last images of an old one waiting for ever.
        """
        with self._changed:
            if self._closed:
                _fail(job, RequestRefusedError("draining", "the server is stopping.", 1.0))
                return
            large = job.pixels > 0
            job.turn, job.number = self._turns[large] + job.rank, next(self._numbers)
            heapq.heappush(self._large if large else self._quick, job)
            self._ahead += not large
            self._changed.notify_all()

    def _next(self, takes_large: bool) -> _Job | None:
        """Wait for the next job; None when the pool is closed."""
        with self._changed:
            while not self._closed:
                heaps = [self._quick] if self._quick else []
                if takes_large and self._large and self._has_room(self._large[0]):
                    heaps.append(self._large)
                if heaps:
                    # The older job first, so that neither queue keeps the other one waiting.
                    heap = min(heaps, key=lambda heap: heap[0].number)
                    job = heapq.heappop(heap)
                    large = job.pixels > 0
                    self._turns[large] = max(self._turns[large], job.turn)
                    self._pixels += job.pixels
                    return job
                self._changed.wait()
            return None

    def _has_room(self, job: _Job) -> bool:
        """Whether the pixels that are decoded at the same time stay within the limit."""
        return not self._pixels or self._pixels + job.pixels <= self._max_pixels

    def _work(self, takes_large: bool) -> None:
        """Hand out jobs to one decoder at a time, and reconnect when it has ended."""
        connection: Connection | None = None
        known: dict[str, ServedModel] = {}
        """Models that the connected decoder knows."""
        while job := self._next(takes_large):
            try:
                if job.future.cancelled():
                    continue
                if time.monotonic() > job.deadline:
                    message = "the deadline passed before the image was decoded."
                    _fail(job, RequestRefusedError("late", message, 1.0))
                    continue
                if connection is not None and connection.poll():
                    connection.close()  # there is no open message: the decoder has ended
                    connection = None
                if connection is None:
                    connection, known = self._connect(), {}
                is_known = known.get(job.message.name) is job.model
                connection.send_bytes(pickle.dumps(_message_to_send(job, is_known)))
                known[job.message.name] = job.model
                connection.send_bytes(job.payload)
                reply = read_reply(connection.recv_bytes())
                self._finish(job, reply, connection.recv_bytes())
            except (EOFError, OSError):
                # The decoder has ended: the kernel has ended it at a limit, or it was killed.
                if connection is not None:
                    connection.close()
                    connection = None
                self._handle_lost_decoder(job)
            except Exception as error:  # an error of this job must not end the thread
                _fail(job, error)
            finally:
                with self._changed:
                    self._pixels -= job.pixels
                    self._ahead -= job.pixels == 0
                    self._changed.notify_all()

    def _finish(self, job: _Job, reply: Reply, body: bytes) -> None:
        match reply:
            case ImageDecoded(shape, size, seconds):
                tensor = torch.frombuffer(bytearray(body), dtype=torch.float32).view(shape)
                if job.quick:
                    self._expected_s += _SMOOTHING * (seconds - self._expected_s)
                _succeed(job, PreparedImage(tensor, size, seconds))
            case ImageIsLarge(pixels):
                self._put(replace(job, pixels=pixels))
            case MaskRendered(share):
                _succeed(job, EncodedMask(body, share))
            case InvalidImage(status, problem):
                _fail(job, ProblemError(status, problem.code, problem.message, problem.field))
            case DecoderFailed(traceback):
                _fail(job, RuntimeError(traceback))

    def _handle_lost_decoder(self, job: _Job) -> None:
        if job.quick:
            # Its number of pixels is not known, so no other large image is decoded beside it.
            self._put(replace(job, pixels=self._max_pixels))
            return
        message = f"{job.message.label} takes too much time or memory to decode."
        label = job.message.label if isinstance(job.message, DecodeImage) else None
        _fail(job, ProblemError(413, "too_costly", message, label))

    def _connect(self) -> Connection:
        """Connect to the next free decoder; start the processes again if they have ended."""
        until = time.monotonic() + _CONNECT_TIMEOUT_S
        while True:
            with socket.socket(socket.AF_UNIX) as ours:
                try:
                    ours.connect(self._address)
                    return Connection(ours.detach())
                except OSError:
                    if self._closed or time.monotonic() > until:
                        raise
            with self._changed:
                if self._process.poll() is not None and not self._closed:
                    _log.error(
                        "the decoders ended with %d, new ones are started", self._process.returncode
                    )
                    self._end_process()
                    self._process = self._start_process()
            time.sleep(0.05)

    @property
    def _address(self) -> str:
        return str(Path(self._folder.name) / "decoders")

    def _start_process(self) -> "subprocess.Popen[bytes]":
        Path(self._address).unlink(missing_ok=True)
        memory = _BYTES_PER_PIXEL * self._max_pixels + _BASE_BYTES
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(self._count)
            handed = (listener.fileno(), self._count, memory)
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "tokendial.serve.workers.decoder", *map(str, handed)],
                stdin=subprocess.PIPE,  # it is closed when the server ends, and so the decoders end
                pass_fds=[listener.fileno()],
                start_new_session=True,  # signals of the terminal are for the server only
            )

    def _end_process(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def _message_to_send(job: _Job, model_is_known: bool) -> DecodeImage | RenderMask:
    message = replace(job.message, model=None) if model_is_known else job.message
    if job.quick and isinstance(message, DecodeImage):
        return replace(message, quick=True, cpu_limit_s=min(_QUICK_CPU_S, message.cpu_limit_s))
    return message


def _succeed(job: _Job, result: object) -> None:
    with contextlib.suppress(InvalidStateError):  # the request was cancelled
        job.future.set_result(result)


def _fail(job: _Job, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        job.future.set_exception(error)
