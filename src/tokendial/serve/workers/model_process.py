"""The server's side of the processes that hold and run models.

Models run in processes of their own because of Python's global interpreter lock: a model that
shares a process with the event loop waits for the lock at each of its operations.

One process, the fork server, loads the models and runs none. Model processes are forked from it.
A fork takes milliseconds, and parent and child share memory that neither writes to, so the weights
are in memory once. When a model process is lost, the next one is forked.
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import torch
from torch import Tensor

from tokendial.runtimes import Runtime
from tokendial.serve.scheduling.engine import WorkerLostError
from tokendial.serve.workers.catalog import ModelCatalog
from tokendial.serve.workers.messages import (
    BatchLogits,
    ForkProcess,
    ImageToEmbed,
    LoadModels,
    MessageT,
    ModelsLoaded,
    ProcessExited,
    ProcessForked,
    ProcessReady,
    RunBatch,
    TokensViewed,
    ViewTokens,
    WaitForExit,
    receive_answer,
    send,
)

HEARTBEAT_S = 0.1
"""Seconds between two heartbeats of a model process."""
CHECK_S = 0.05
"""Seconds between two checks of a model process by the supervisor."""
_MAX_SILENCE_S = 1.0
"""Longest time without a heartbeat of a model process that runs batches."""
_MAX_SILENCE_AT_START_S = 60.0
"""The same during its start: drivers of accelerators may stop all of its threads for long."""
_FORK_TIMEOUT_S, _EXIT_TIMEOUT_S = 5.0, 1.0
"""Longest waits for answers of the fork server; they usually take milliseconds."""


class ForkServer:
    """Process that holds the models in memory and forks model processes. Thread-safe.

    It ends with the server, however that ends, because its socket is closed then.
    """

    def __init__(self, order: LoadModels) -> None:
        """Start the process; `wait` waits until the models are loaded."""
        self._order, self._memory = order, _unnamed_file()
        ours, theirs = socket.socketpair()
        with theirs:
            handed = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tokendial.serve.workers.worker", *map(str, handed)],
                pass_fds=handed,
                start_new_session=True,  # signals of the terminal are for the server only
            )
        self._pipe = Connection(ours.detach())
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait until the models are loaded.

        Raises:
            ValueError: As `order.load` does.
            WorkerLostError: If the process has ended.
        """
        try:
            send(self._pipe, self._order)
            self.catalog: ModelCatalog = self._answer(ModelsLoaded, None).catalog
            shape = self.catalog.input_shape
            self._images = shared_images(self._memory, self._order.max_batch, shape)
        finally:
            os.close(self._memory)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def fork(self, runtime: Runtime | None = None) -> "ModelProcess":
        """Fork a model process, which is not ready yet.

        Args:
            runtime: Where and how it computes; None: as `order` says.

        Raises:
            WorkerLostError: If the fork server has ended or does not answer.
        """
        ours, theirs = socket.socketpair()
        heartbeats, sender = socket.socketpair()
        with theirs, sender, self._lock:
            try:
                send(self._pipe, ForkProcess(runtime))
                for end in (theirs, sender):
                    send_handle(self._pipe, end.fileno(), self._process.pid)
                pid = self._answer(ProcessForked, _FORK_TIMEOUT_S).pid
            except BaseException:
                ours.close()
                heartbeats.close()
                raise
        return ModelProcess(self, pid, Connection(ours.detach()), heartbeats, self._images)

    def wait_for_exit(self, pid: int) -> int | None:
        """Exit code of a forked process that was killed; None if it is not known."""
        with self._lock, suppress(WorkerLostError, OSError):
            send(self._pipe, WaitForExit(pid))
            return self._answer(ProcessExited, _EXIT_TIMEOUT_S).code
        return None

    def close(self) -> None:
        """End the process. Calls that wait for it raise a WorkerLostError."""
        self._process.kill()
        self._process.wait()

    def _answer(self, kind: type[MessageT], timeout_s: float | None) -> MessageT:
        try:
            if not self._pipe.poll(timeout_s):
                # After a late answer, all later answers would belong to the wrong messages.
                self.close()
                raise WorkerLostError("the process that holds the models did not answer.")
            return receive_answer(self._pipe, kind)
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise WorkerLostError(f"the process that holds the models ended with {code}.") from None


class ModelProcess:
    """Process that runs batches.

    `run`, `view` and `wait` are for one thread at a time. `failure`, `silence_s` and `kill` may be
    called from any thread. Images reach the process through shared memory, everything else
    through a pair of sockets.
    """

    runtime: Runtime
    """Where and how it computes, known when it is ready."""

    def __init__(
        self,
        fork_server: ForkServer,
        pid: int,
        pipe: Connection,
        heartbeats: socket.socket,
        images: Tensor,
    ) -> None:
        self.pid = pid
        self._fork_server, self._pipe, self._images = fork_server, pipe, images
        self._heartbeats = heartbeats
        heartbeats.setblocking(False)
        self._lock = threading.Lock()
        self._silent_checks = 0
        """Number of successive checks without a heartbeat."""
        self._ready, self._killed = False, False
        self._call: _PendingCall | None = None

    def wait(self) -> None:
        """Wait until the process can run batches.

        Raises:
            ValueError: If a setting does not fit the models.
            WorkerLostError: If the process has ended.
        """
        self.runtime = self._answer(ProcessReady).runtime
        self._ready = True

    def run(
        self,
        name: str,
        degree: int,
        images: Sequence[Tensor | ImageToEmbed],
        limit_s: float | None = None,
    ) -> list[Tensor]:
        """Return the logits of each image, or the embedding of an `ImageToEmbed`.

        Args:
            name: Name of the model.
            degree: Degree of the dial.
            images: Normalised images, [3, H, W] each.
            limit_s: Seconds after which the process counts as stuck; None: never.

        Raises:
            WorkerLostError: If the process has ended.
        """
        wants_embedding = [isinstance(image, ImageToEmbed) for image in images]
        tensors = [i.tensor if isinstance(i, ImageToEmbed) else i for i in images]
        torch.stack(tensors, out=self._images[: len(images)])
        message = RunBatch(name, degree, len(images), embeddings=any(wants_embedding))
        return choose_outputs(wants_embedding, self._ask(message, BatchLogits, limit_s))

    def view(
        self, name: str, degree: int, image: Tensor, limit_s: float | None = None
    ) -> TokensViewed:
        """Return the tokens of a normalised image [3, H, W]; arguments as in `run`."""
        return self._ask(ViewTokens(name, degree, image), TokensViewed, limit_s)

    def failure(self) -> str | None:
        """Return why the process has to be replaced, or None. To be called every `CHECK_S`.

        Time is counted in checks, not by the clock: if the whole machine was suspended, the
        process is not to blame.
        """
        with self._lock:
            if self._killed:
                return "was ended"
            try:
                if not self._heartbeats.recv(4096):
                    return "has ended"
                self._silent_checks = 0
            except BlockingIOError:
                self._silent_checks += 1
        if self.silence_s > (_MAX_SILENCE_S if self._ready else _MAX_SILENCE_AT_START_S):
            return "stands still"
        if call := self._call:
            call.checks += 1
            if call.limit_s is not None and call.checks * CHECK_S > call.limit_s:
                return f"has not answered for {call.limit_s:.1f} s"
        return None

    @property
    def silence_s(self) -> float:
        """Seconds since the last heartbeat."""
        return self._silent_checks * CHECK_S

    def kill(self) -> int | None:
        """End the process and return its exit code, if known.

        Calls that wait for an answer raise a WorkerLostError.
        """
        with self._lock:
            if self._killed:
                return None
            self._killed = True
            # If it has ended already, it stays a zombie until `wait_for_exit`; so the kernel has
            # not given its identifier to another process.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._heartbeats.close()
        return self._fork_server.wait_for_exit(self.pid)

    def _ask(
        self, message: RunBatch | ViewTokens, kind: type[MessageT], limit_s: float | None
    ) -> MessageT:
        self._call = _PendingCall(limit_s)
        try:
            send(self._pipe, message)
            return self._answer(kind)
        except ConnectionError:
            raise WorkerLostError("the model process was lost.") from None
        finally:
            self._call = None

    def _answer(self, kind: type[MessageT]) -> MessageT:
        try:
            return receive_answer(self._pipe, kind)
        except (EOFError, ConnectionError):
            raise WorkerLostError("the model process was lost.") from None


@dataclass(slots=True)
class _PendingCall:
    """A message that has no answer yet."""

    limit_s: float | None
    """Seconds after which the process counts as stuck; None: never."""
    checks: int = 0
    """Number of checks of the process since the message was sent."""


def choose_outputs(wants_embedding: Sequence[bool], answer: BatchLogits) -> list[Tensor]:
    """Return for each image of a batch its embedding if it is wanted, else its logits."""
    logits = torch.from_numpy(answer.logits)
    if answer.embeddings is None:
        return list(logits)
    pairs = zip(wants_embedding, torch.from_numpy(answer.embeddings), logits, strict=True)
    return [embedding if wanted else own for wanted, embedding, own in pairs]


def shared_images(file: int, count: int, shape: Sequence[int]) -> Tensor:
    """Map a file that several processes have open as a tensor of `count` images."""
    size = torch.Size((count, *shape))
    os.ftruncate(file, size.numel() * torch.float32.itemsize)
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.float32).view(size)


def _unnamed_file() -> int:
    """Open a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tokendial")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
