"""Models in a process of their own: what Python does for HTTP would hold them up.

Python lets one thread at a time through. A model beside the event loop and decoders waits for them
at each of its operations; a small one, whose operations are short, for longer than they take.
"""

import mmap
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendial.serve.facts import Facts
from tokendial.serve.token_view import TokenView

if TYPE_CHECKING:
    from tokendial.serve.models import Models


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is to do; it is pickled."""

    load: "Callable[[], Models]"
    most: int
    """Images of the largest batch."""
    threads: int | None
    """Of the model; None: torch's choice."""


class GoneError(RuntimeError):
    """The process has ended; another one may do."""


class Apart:
    """Models that another process has in memory; for one thread at a time.

    Images go there through memory that both have, everything else through a pair of sockets. The
    process ends with this one, however that ends: its socket is closed then.
    """

    def __init__(self, order: Order) -> None:
        """Start the process, and wait until it has loaded the models.

        Raises:
            ValueError: As `order.load` does.
            GoneError: If the process has ended.
        """
        ours, theirs = socket.socketpair()
        memory = _unnamed_file()
        with theirs:
            handed = (theirs.fileno(), memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tokendial.serve.worker", *map(str, handed)],
                pass_fds=handed,
                start_new_session=True,  # what a terminal sends is for the server
            )
        self._pipe = Connection(ours.detach())
        try:
            self.facts: Facts = self._ask(order)
            self._images = shared_images(memory, order.most, self.facts.input_shape)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)

    def run(self, name: str, degree: int, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each image; a GoneError if the process has ended."""
        torch.stack(list(images), out=self._images[: len(images)])
        return list(torch.from_numpy(self._ask("run", name, degree, len(images))))

    def view(self, name: str, degree: int, image: Tensor) -> tuple[TokenView, str]:
        """The tokens of an image, and what the model sees of it, as `Models.view`."""
        found: tuple[TokenView, str] = self._ask("view", name, degree, image)
        return found

    def close(self) -> None:
        """End the process; whoever waits for an answer gets a GoneError."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _ask(self, *asked: Any) -> Any:
        try:
            send(self._pipe, asked)
            answer, error = receive(self._pipe)
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise GoneError(f"the process of the models ended with {code}.") from None
        if error:
            raise error
        return answer


def send(pipe: Connection, message: Any) -> None:
    """Pickled as plain data: the connection's own way sends tensors as open files."""
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe: Connection) -> Any:
    """What `send` has sent."""
    return pickle.loads(pipe.recv_bytes())  # from a process of our own


def shared_images(file: int, most: int, shape: Sequence[int]) -> Tensor:
    """Room for `most` images in a file that two processes have open."""
    size = torch.Size((most, *shape))
    os.ftruncate(file, size.numel() * torch.float32.itemsize)
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.float32).view(size)


def _unnamed_file() -> int:
    """A file that is gone when nobody has it open; in memory where there is such a thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tokendial")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
