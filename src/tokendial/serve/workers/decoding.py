"""Who decodes what, and when: images of clients, in processes that may be ended at any time.

What a client sends may take any library any time, and Python's lock with it. So it is opened in
another process, which the system ends at a limit of time and memory (`decoder`). An image that is
decoded quickly is; for another one, this process learns how large it is, and it waits in a second
queue, which leaves one of the decoders to the quick ones. Within a queue requests take turns.
"""

import contextlib
import heapq
import itertools
import json
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

from tokendial.serve.http.problems import ProblemError
from tokendial.serve.http.schemas import Problem
from tokendial.serve.scheduling.scheduler import Refused
from tokendial.serve.settings import Settings
from tokendial.serve.workers.facts import TaskOf

_log = logging.getLogger(__name__)
QUICK_PIXELS = 1_000_000
"""What has more is not decoded quickly."""
_QUICK_S = 0.15
"""Of a processor; what takes longer is not decoded quickly."""
_BYTES_PER_PIXEL = 32
"""What decoding takes at most: floating-point images, and such with transparency."""
_BASE_BYTES = 256 * 2**20
"""What a process takes besides."""
_LEARNT = 0.1
"""Smoothing factor of the measured time of quick images."""
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as the model takes it."""

    tensor: Tensor
    """[3, H, W]."""
    size: tuple[int, int]
    """Height and width of the image itself, in pixels."""
    seconds: float
    """How long it took to decode it."""


@dataclass(frozen=True, slots=True)
class PaintedMask:
    """A mask as it is answered."""

    png: bytes
    """Base64 of the file."""
    share: float
    """Share of the pixels that lie inside."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done with the bytes that follow."""

    name: str
    """Of the model."""
    of: TaskOf | None
    """What it stands for; None: as told before."""
    seconds: float
    """Of a processor, after which the process is ended."""
    called: str = ""
    """What errors call the image."""
    base64: bool = False
    """Whether the image is base64."""
    max_pixels: int = 0
    """Of an image."""
    shape: tuple[int, ...] = ()
    """What the models take: [3, H, W]."""
    quick: bool = False
    """Whether a large image is only to be told."""
    logits: tuple[int, ...] | None = None
    """Their shape: the bytes are the logits of a mask, not an image."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the mask."""


@dataclass(order=True, slots=True)
class _Job:
    turn: float
    number: int
    order: Order = field(compare=False)
    of: TaskOf = field(compare=False)
    payload: Any = field(compare=False)
    until: float = field(compare=False)
    rank: int = field(compare=False)
    most_s: float = field(compare=False)
    """What it may take in the second queue."""
    pixels: int = field(compare=False, default=0)
    """Those that count in the second queue; 0: it waits in the first one."""
    future: "Future[Any]" = field(compare=False, default_factory=Future)


class DecoderPool:
    """Some decoders, and those who wait for them."""

    def __init__(self, settings: Settings) -> None:
        """Start them; they are ready some seconds later, and what comes until then waits."""
        self._count, self._max_pixels = settings.decoders, settings.max_pixels
        self._changed = threading.Condition()
        self._quick: list[_Job] = []
        self._large: list[_Job] = []
        self._numbers, self._turns = itertools.count(), [0.0, 0.0]
        self._pixels = self._ahead = 0
        self._expected_s, self._closed = 0.0, False
        self._folder = tempfile.TemporaryDirectory(prefix="tokendial-")
        self._process = self._started()
        for index in range(self._count):
            # One is kept for quick images, if there are several.
            takes_large = index > 0 or self._count == 1
            threading.Thread(
                target=self._work, args=[takes_large], name="tokendial-decoder", daemon=True
            ).start()

    @property
    def ahead(self) -> int:
        """Images that wait or are being decoded, except those that are known to be large."""
        return self._ahead

    @property
    def wait_s(self) -> float:
        """Seconds that a new image is going to wait, by what the latest ones took."""
        return self._ahead // self._count * self._expected_s

    def prepare(
        self,
        name: str,
        of: TaskOf,
        file: bytes | memoryview,
        *,
        called: str,
        rank: int,
        until: float,
        shape: tuple[int, ...],
        settings: Settings,
        base64: bool = False,
    ) -> "Future[Prepared]":
        """Decode an image and prepare it for a model.

        Args:
            name: Of the model.
            of: What it stands for.
            file: The image.
            called: What errors call it.
            rank: How many of the same request come before it.
            until: When it is too late, by `time.monotonic`.
            shape: What the models take: [3, H, W].
            settings: Pixels and seconds that it may take.
            base64: Whether the file is base64, as JSON holds it.

        Returns:
            It fails with a ProblemError if it is not such an image, with Refused if it is too late.
        """
        order = Order(
            name,
            None,
            min(_QUICK_S, settings.max_decode_s),
            called,
            base64=base64,
            max_pixels=settings.max_pixels,
            shape=shape,
            quick=True,
        )
        job = _Job(0, 0, order, of, file, until, rank, settings.max_decode_s)
        self._put(job)
        return job.future

    def paint(
        self,
        name: str,
        of: TaskOf,
        logits: Tensor,
        size: tuple[int, int],
        *,
        until: float,
        settings: Settings,
    ) -> "Future[PaintedMask]":
        """Make the mask [height, width] of an image from its logits [K, h, w]."""
        order = Order(name, None, settings.max_decode_s, logits=tuple(logits.shape), size=size)
        payload = logits.float().contiguous().numpy().reshape(-1)
        pixels = size[0] * size[1]
        pixels = min(pixels, self._max_pixels) if pixels > QUICK_PIXELS else 0
        job = _Job(0, 0, order, of, payload, until, 0, settings.max_decode_s, pixels)
        self._put(job)
        return job.future

    def close(self) -> None:
        """End the processes; whoever still waits gets a Refused."""
        with self._changed:
            self._closed = True
            left, self._quick, self._large = [*self._quick, *self._large], [], []
            self._changed.notify_all()
        for job in left:
            _fail(job, Refused("draining", "the server is stopping.", 1.0))
        self._end()
        self._folder.cleanup()

    def _put(self, job: _Job) -> None:
        """Let a job wait for its turn: the second image of a request comes after the first of all.

        Turns count from the one that is served now, so that new requests do not keep an old one's
        last images waiting for ever.
        """
        with self._changed:
            if self._closed:
                _fail(job, Refused("draining", "the server is stopping.", 1.0))
                return
            large = job.pixels > 0
            job.turn, job.number = self._turns[large] + job.rank, next(self._numbers)
            heapq.heappush(self._large if large else self._quick, job)
            self._ahead += not large
            self._changed.notify_all()

    def _next(self, takes_large: bool) -> _Job | None:
        """The job whose turn it is; None at the end."""
        with self._changed:
            while not self._closed:
                heaps = [self._quick] if self._quick else []
                if takes_large and self._large and self._has_room(self._large[0]):
                    heaps.append(self._large)
                if heaps:
                    heap = min(
                        heaps, key=lambda heap: heap[0].number
                    )  # neither keeps out the other
                    job = heapq.heappop(heap)
                    large = job.pixels > 0
                    self._turns[large] = max(self._turns[large], job.turn)
                    self._pixels += job.pixels
                    return job
                self._changed.wait()
            return None

    def _has_room(self, job: _Job) -> bool:
        return not self._pixels or self._pixels + job.pixels <= self._max_pixels

    def _work(self, takes_large: bool) -> None:
        """One decoder's thread: it sends jobs, and waits for what comes of them."""
        connection: Connection | None = None
        told: dict[str, TaskOf] = {}
        while job := self._next(takes_large):
            try:
                if job.future.cancelled():
                    continue
                if time.monotonic() > job.until:
                    message = "the deadline went by before the image was decoded."
                    _fail(job, Refused("late", message, 1.0))
                    continue
                if connection is not None and connection.poll():
                    connection.close()  # nothing was asked: its process has ended
                    connection = None
                if connection is None:
                    connection, told = self._connected(), {}
                order = job.order
                if told.get(order.name) is not job.of:
                    order = replace(order, of=job.of)
                    told[order.name] = job.of
                connection.send_bytes(pickle.dumps(order))
                connection.send_bytes(job.payload)
                head = json.loads(connection.recv_bytes())
                self._answer(job, head, connection.recv_bytes())
            except (EOFError, OSError):
                # The system has ended the process, or somebody did.
                if connection is not None:
                    connection.close()
                    connection = None
                self._unanswered(job)
            except Exception as error:  # it is about one job
                _fail(job, error)
            finally:
                with self._changed:
                    self._pixels -= job.pixels
                    self._ahead -= job.pixels == 0
                    self._changed.notify_all()

    def _answer(self, job: _Job, head: dict[str, Any], body: bytes) -> None:
        if "problem" in head:
            problem = Problem(**head["problem"])
            _fail(job, ProblemError(head["status"], problem.code, problem.message, problem.field))
        elif "failed" in head:
            _fail(job, RuntimeError(head["failed"]))
        elif "pixels" in head:
            self._put_again(job, head["pixels"])
        elif "share" in head:
            _succeed(job, PaintedMask(body, head["share"]))
        else:
            tensor = torch.frombuffer(bytearray(body), dtype=torch.float32).view(head["shape"])
            if job.order.quick:
                self._expected_s += _LEARNT * (head["seconds"] - self._expected_s)
            height, width = head["size"]
            _succeed(job, Prepared(tensor, (height, width), head["seconds"]))

    def _unanswered(self, job: _Job) -> None:
        if job.order.quick:
            # Nothing is known of how many pixels it has, so it shall be decoded alone.
            self._put_again(job, self._max_pixels)
            return
        message = f"{job.order.called or 'the mask'} takes too much time or memory."
        _fail(job, ProblemError(413, "too_costly", message, job.order.called or None))

    def _put_again(self, job: _Job, pixels: int) -> None:
        """Let a job wait among those that are not quick."""
        order = replace(job.order, quick=False, seconds=job.most_s)
        self._put(replace(job, order=order, pixels=pixels))

    def _connected(self) -> Connection:
        """A connection to the next decoder that is free; another process if there is none left."""
        until = time.monotonic() + _START_S
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
                        "the decoders ended with %d, others are started", self._process.returncode
                    )
                    self._end()
                    self._process = self._started()
            time.sleep(0.05)

    @property
    def _address(self) -> str:
        return str(Path(self._folder.name) / "decoders")

    def _started(self) -> "subprocess.Popen[bytes]":
        Path(self._address).unlink(missing_ok=True)
        memory = _BYTES_PER_PIXEL * self._max_pixels + _BASE_BYTES
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(self._count)
            handed = (listener.fileno(), self._count, memory)
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "tokendial.serve.workers.decoder", *map(str, handed)],
                stdin=subprocess.PIPE,  # it ends when we do
                pass_fds=[listener.fileno()],
                start_new_session=True,  # what a terminal sends is for the server
            )

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def _succeed(job: _Job, result: object) -> None:
    with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
        job.future.set_result(result)


def _fail(job: _Job, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        job.future.set_exception(error)
