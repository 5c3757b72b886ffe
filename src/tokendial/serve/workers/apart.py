"""Models in processes of their own: what Python does for HTTP would hold them up.

Python lets one thread at a time through. A model beside the event loop and decoders waits for them
at each of its operations; a small one, whose operations are short, for longer than they take.

One process loads the models, and computes nothing. Those that compute are forked from it: that
takes milliseconds, and they share its memory for as long as they do not write to it, so that
weights are in memory once. When one is lost, the next is forked.
"""

import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendial.serve.scheduling.engine import LostError
from tokendial.serve.workers.facts import Facts
from tokendial.serve.workers.token_view import TokenView
from tokendial.tune import SpeedSettings

if TYPE_CHECKING:
    from tokendial.serve.workers.models import Models

BEAT_S = 0.1
"""How often a process that computes shows that it lives."""
LOOK_S = 0.05
"""How often that is looked at."""
_STILL_S = 1.0
"""For so long one that runs may show nothing, and..."""
_PREPARING_S = 60.0
"""... one that is made ready, where drivers of accelerators hold up every thread."""
_FORK_S, _ENDED_S = 5.0, 1.0
"""For the answers of a process that holds models, which take milliseconds."""


@dataclass(frozen=True, slots=True)
class Order:
    """What processes are to do; it is pickled."""

    load: "Callable[[], Models]"
    speed: SpeedSettings
    most: int
    """Images of the largest batch."""
    threads: int | None
    """Of the model; None: torch's choice."""


class Loaded:
    """A process that has models in memory, for others to be forked from; for any thread.

    It ends with this process, however that ends: its socket is closed then.
    """

    def __init__(self, order: Order) -> None:
        """Start the process; `wait` for it."""
        self._order, self._memory = order, _unnamed_file()
        ours, theirs = socket.socketpair()
        with theirs:
            handed = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tokendial.serve.workers.worker", *map(str, handed)],
                pass_fds=handed,
                start_new_session=True,  # what a terminal sends is for the server
            )
        self._pipe = Connection(ours.detach())
        self._turn = threading.Lock()

    def wait(self) -> None:
        """Until it has loaded the models.

        Raises:
            ValueError: As `order.load` does.
            LostError: If the process has ended.
        """
        try:
            send(self._pipe, self._order)
            self.facts: Facts = self._answer(None)
            shape = self.facts.input_shape
            self._images = shared_images(self._memory, self._order.most, shape)
        finally:
            os.close(self._memory)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def fork(self) -> "Apart":
        """A process that computes, which is not ready yet; a LostError if there is none."""
        ours, theirs = socket.socketpair()
        pulse, heart = socket.socketpair()
        with theirs, heart, self._turn:
            try:
                send(self._pipe, None)
                for end in (theirs, heart):
                    send_handle(self._pipe, end.fileno(), self._process.pid)
                pid: int = self._answer(_FORK_S)
            except BaseException:
                ours.close()
                pulse.close()
                raise
        return Apart(self, pid, Connection(ours.detach()), pulse, self._images)

    def ended(self, pid: int) -> int | None:
        """How a process ended that was forked and killed; None: it is not known."""
        with self._turn, suppress(LostError, OSError):
            send(self._pipe, pid)
            code: int = self._answer(_ENDED_S)
            return code
        return None

    def close(self) -> None:
        """End the process; whoever waits for it gets a LostError."""
        self._process.kill()
        self._process.wait()

    def _answer(self, within_s: float | None) -> Any:
        try:
            if not self._pipe.poll(within_s):
                self.close()  # it stands still, and answers would be taken for those to come
                raise LostError("the process that holds the models did not answer.")
            return _received(self._pipe)
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise LostError(f"the process that holds the models ended with {code}.") from None


class Apart:
    """A process that computes; for one thread at a time, but for `trouble`, `still_s` and `kill`.

    Images go there through memory that both have, everything else through a pair of sockets.
    """

    def __init__(
        self, loaded: Loaded, pid: int, pipe: Connection, pulse: socket.socket, images: Tensor
    ) -> None:
        self.pid = pid
        self._loaded, self._pipe, self._pulse, self._images = loaded, pipe, pulse, images
        pulse.setblocking(False)
        self._turn = threading.Lock()
        self._still = 0
        """How often it was looked at in a row without a sign of life."""
        self._ready, self._killed = False, False
        self._call: _Call | None = None

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            ValueError: If a setting does not fit the models.
            LostError: If it has ended.
        """
        self._receive()
        self._ready = True

    def run(
        self, name: str, degree: int, images: Sequence[Tensor], within_s: float | None = None
    ) -> list[Tensor]:
        """Logits of each image.

        Args:
            name: Of the model.
            degree: Of the dial.
            images: [3, H, W] each.
            within_s: After which the process is in trouble.

        Raises:
            LostError: If the process has ended.
        """
        torch.stack(list(images), out=self._images[: len(images)])
        return list(torch.from_numpy(self._ask(within_s, "run", name, degree, len(images))))

    def view(
        self, name: str, degree: int, image: Tensor, within_s: float | None = None
    ) -> tuple[TokenView, str]:
        """The tokens of an image, and what the model sees of it, as `Models.view`."""
        found: tuple[TokenView, str] = self._ask(within_s, "view", name, degree, image)
        return found

    def trouble(self) -> str | None:
        """Why it is of no more use; None: it is. To be called every `LOOK_S`.

        Looks are counted, not seconds: if the whole machine was suspended, nobody is to blame.
        """
        with self._turn:
            if self._killed:
                return "was ended"
            try:
                if not self._pulse.recv(4096):
                    return "has ended"
                self._still = 0
            except BlockingIOError:
                self._still += 1
        if self._still * LOOK_S > (_STILL_S if self._ready else _PREPARING_S):
            return "stands still"
        if call := self._call:
            call.looks += 1
            if call.within_s is not None and call.looks * LOOK_S > call.within_s:
                return f"has not answered for {call.within_s:.1f} s"
        return None

    @property
    def still_s(self) -> float:
        """Seconds without a sign of life."""
        return self._still * LOOK_S

    def kill(self) -> int | None:
        """End it, and tell how it has ended; whoever waits for an answer gets a LostError."""
        with self._turn:
            if self._killed:
                return None
            self._killed = True
            # If it has ended it is a zombie until `ended`, and nobody else has its number.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._pulse.close()
        return self._loaded.ended(self.pid)

    def _ask(self, within_s: float | None, *asked: Any) -> Any:
        self._call = _Call(within_s)
        try:
            send(self._pipe, asked)
            return self._receive()
        except ConnectionError:
            raise LostError("the process of the models was lost.") from None
        finally:
            self._call = None

    def _receive(self) -> Any:
        try:
            return _received(self._pipe)
        except (EOFError, ConnectionError):
            raise LostError("the process of the models was lost.") from None


@dataclass(slots=True)
class _Call:
    """What a process was asked last."""

    within_s: float | None
    """It has to be answered; None: whenever."""
    looks: int = 0
    """How often the process was looked at since."""


def send(pipe: Connection, message: Any) -> None:
    """Pickled as plain data: the connection's own way sends tensors as open files."""
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe: Connection) -> Any:
    """What `send` has sent."""
    return pickle.loads(pipe.recv_bytes())  # from a process of our own


def shared_images(file: int, most: int, shape: Sequence[int]) -> Tensor:
    """Room for `most` images in a file that several processes have open."""
    size = torch.Size((most, *shape))
    os.ftruncate(file, size.numel() * torch.float32.itemsize)
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.float32).view(size)


def _received(pipe: Connection) -> Any:
    """An answer; the error that was sent in its place is raised."""
    answer, error = receive(pipe)
    if error:
        raise error
    return answer


def _unnamed_file() -> int:
    """A file that is gone when nobody has it open; in memory where there is such a thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tokendial")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
