"""The supervisor: runs batches in a model process, and replaces a process that is lost or stuck."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from tokendial.errors import error_message
from tokendial.serve.scheduling.engine import WorkerLostError
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.workers.catalog import ModelCatalog
from tokendial.serve.workers.messages import ImageToEmbed, TokensViewed
from tokendial.serve.workers.model_process import CHECK_S, ForkServer, ModelProcess

_log = logging.getLogger(__name__)
_REPLACEMENT_WAIT_S = 2.0
"""Longest wait for a process that is being replaced."""
_SUSPICIOUS_SILENCE_S = 0.4
"""Seconds without a heartbeat after which the server counts as not ready."""
_FREE_LOSSES = 4
"""Number of successive losses that are replaced at once. From then on the pause doubles."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_LOSSES_FORGOTTEN_S = 30.0
"""Seconds without a loss after which the count of losses starts again."""
_VIEW_LIMIT_S = 20.0
"""Seconds after which a process counts as stuck that makes a view of tokens."""

ProcessT = TypeVar("ProcessT", ForkServer, ModelProcess)


class Supervisor:
    """Owns the fork server, the model process that runs batches, and perhaps a spare one.

    `run` and `view` are for one thread at a time, everything else for any thread. A watcher thread
    checks the processes every `CHECK_S` and starts what is missing.

    Invariants: all attributes are changed only while `_changed` is held. A process that is given
    up is removed from its place at once and put on `_to_kill`; only the watcher kills it, because
    waiting for its end may take a second.
    """

    catalog: ModelCatalog
    """Description of the models."""

    def __init__(
        self,
        start: Callable[[], ForkServer],
        restart: Callable[[], ForkServer],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the processes, and wait until one can run batches.

        Args:
            start: Starts a fork server.
            restart: Starts a fork server with the same models when the first one is lost.
            clock: Returns the time in seconds; must never go back.

        Raises:
            ValueError: If models cannot be loaded, or a setting does not fit them.
            WorkerLostError: If a process ended meanwhile.
        """
        self._restart, self._with_spare, self._clock = restart, False, clock
        self._changed = threading.Condition()
        self._check_now, self._closed = threading.Event(), False
        self._starting: list[ForkServer | ModelProcess] = []
        self._to_kill: list[tuple[ModelProcess, str]] = []
        """Processes that were given up, and why."""
        self._fork_server: ForkServer | None = None
        self._current: ModelProcess | None = None
        self._spare: ModelProcess | None = None
        self._missing_since: float | None = None
        self._losses, self._last_loss, self._next_try = 0, 0.0, 0.0
        self._starter: threading.Thread | None = None
        fork_server, self._current = self.start_processes(start)
        self._fork_server, self.catalog = fork_server, fork_server.catalog
        self._runtime = self._current.runtime
        """What the first model process chose. Those that replace it do not measure again beside a
        server that answers."""
        self._watcher = threading.Thread(target=self._watch, name="tokendial-watch", daemon=True)
        self._watcher.start()

    @property
    def missing_s(self) -> float:
        """Seconds for which no model process has answered; 0 if there is one."""
        with self._changed:
            if self._missing_since is not None:
                return self._clock() - self._missing_since
            silence_s = self._current.silence_s if self._current else 0.0
            return silence_s if silence_s > _SUSPICIOUS_SILENCE_S else 0.0

    def keep_spare(self) -> None:
        """Keep a second model process ready from now on. To start it takes time of all cores."""
        with self._changed:
            self._with_spare = True
        self._check_now.set()

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
            WorkerLostError: If the process was lost; it is being replaced.
            RequestRefusedError: If there is no process, and will be none for a while.
        """
        process = self._wait_for_process()
        try:
            return process.run(name, degree, images, limit_s)
        except WorkerLostError:
            self._report_loss(process)
            raise

    def view(self, name: str, degree: int, image: Tensor) -> TokensViewed:
        """Return the tokens of a normalised image [3, H, W]; raises a RequestRefusedError."""
        process = self._wait_for_process()
        try:
            return process.view(name, degree, image, _VIEW_LIMIT_S)
        except WorkerLostError as error:
            self._report_loss(process)
            raise RequestRefusedError("lost", str(error), 1.0) from None

    def start_processes(self, start: Callable[[], ForkServer]) -> tuple[ForkServer, ModelProcess]:
        """Start a fork server and a model process beside the present ones.

        The caller passes them to `replace_processes`, or ends them.

        Raises:
            ValueError: If models cannot be loaded, or a setting does not fit them.
            WorkerLostError: If a process ended meanwhile.
        """
        fork_server = self._wait_until_ready(start())
        try:
            return fork_server, self._wait_until_ready(fork_server.fork())
        except BaseException:
            fork_server.close()
            raise

    def replace_processes(
        self, restart: Callable[[], ForkServer], fork_server: ForkServer, process: ModelProcess
    ) -> None:
        """Use other processes from now on, and end the present ones.

        Args:
            restart: Starts a fork server with the new models when the new one is lost.
            fork_server: The new fork server, from `start_processes`.
            process: The new model process, from `start_processes`.
        """
        with self._changed:
            old = (self._current, self._spare, self._fork_server)
            self._restart, self._fork_server = restart, fork_server
            self.catalog = fork_server.catalog
            self._current, self._spare, self._missing_since = process, None, None
            self._runtime = process.runtime
            self._changed.notify_all()
        _end(*old)

    def close(self) -> None:
        """End all processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._check_now.set()
        # The fork server comes first: it may stand still, and the end of the others would wait
        # for it.
        _end(self._fork_server, *self._starting, self._current, self._spare)
        self._watcher.join()
        if self._starter:
            self._starter.join()

    def _wait_for_process(self) -> ModelProcess:
        """Return the model process; wait for a moment if it is being replaced.

        Raises:
            RequestRefusedError: If there is none, and will be none for a while.
        """
        with self._changed:
            until = self._clock() + _REPLACEMENT_WAIT_S
            while self._current is None:
                now = self._clock()
                if self._closed or now >= until or self._next_try > now:
                    message = "the model process was lost, another one is being started."
                    raise RequestRefusedError("lost", message, max(1.0, self._next_try - now))
                self._changed.wait(until - now)
            return self._current

    def _report_loss(self, process: ModelProcess) -> None:
        with self._changed:
            self._give_up(process, "was lost")
        self._check_now.set()

    def _wait_until_ready(self, process: ProcessT) -> ProcessT:
        with self._changed:
            closed = self._closed
            self._starting.append(process)
        try:
            if closed:
                raise WorkerLostError("the server is stopping.")
            process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            with self._changed:
                self._starting.remove(process)
        return process

    def _watch(self) -> None:
        while not self._closed:
            self._check_now.wait(CHECK_S)
            self._check_now.clear()
            with self._changed:
                for process in (*self._starting, self._current, self._spare):
                    if isinstance(process, ModelProcess) and (why := process.failure()):
                        self._give_up(process, why)
                to_kill, self._to_kill = self._to_kill, []
            for process, why in to_kill:
                code = process.kill()
                _log.error("a model process %s (%s).", why, code)
            with self._changed:
                if self._fork_server and not self._fork_server.alive:
                    self._fork_server = None
                if self._lacks_process() and not (self._starter and self._starter.is_alive()):
                    self._starter = threading.Thread(target=self._start_missing, daemon=True)
                    self._starter.start()

    def _give_up(self, process: ModelProcess, why: str) -> None:
        """Remove a process from its place, which the spare one takes if there is one."""
        if process is self._current:
            self._current, self._spare = self._spare, None
            if self._current is None:
                self._missing_since = self._clock()
        elif process is self._spare:
            self._spare = None
        elif process not in self._starting:
            return  # it was given up before
        self._to_kill.append((process, why))
        self._count_loss()
        self._changed.notify_all()

    def _count_loss(self) -> None:
        now = self._clock()
        recent = now - self._last_loss < _LOSSES_FORGOTTEN_S
        self._losses = self._losses + 1 if recent else 1
        self._last_loss = self._next_try = now
        if (more := self._losses - _FREE_LOSSES) > 0:
            self._next_try += min(_FIRST_PAUSE_S * 2 ** (more - 1), _MAX_PAUSE_S)

    def _lacks_process(self) -> bool:
        if self._closed or self._clock() < self._next_try:
            return False
        spare = self._spare or not self._with_spare
        return not (self._fork_server and self._current and spare)

    def _start_missing(self) -> None:
        """Start one process that is missing: the fork server, else a model process."""
        fork_server = self._fork_server
        try:
            if fork_server is None:
                _log.error("the fork server was lost: the models are loaded again.")
                self._take_fork_server(self._wait_until_ready(self._restart()))
            else:
                process = self._wait_until_ready(fork_server.fork(self._runtime))
                self._take_process(fork_server, process)
        except (ValueError, OSError, RuntimeError) as error:
            _log.error("no process could be started: %s", error_message(error))
            with self._changed:
                self._count_loss()

    def _take_fork_server(self, fork_server: ForkServer) -> None:
        with self._changed:
            wanted = self._fork_server is None and not self._closed
            if wanted:
                self._fork_server, self.catalog = fork_server, fork_server.catalog
        if not wanted:  # a reload has installed another one meanwhile
            fork_server.close()

    def _take_process(self, fork_server: ForkServer, process: ModelProcess) -> None:
        with self._changed:
            wanted = fork_server is self._fork_server and not self._closed
            if wanted and self._current is None:
                self._current, self._missing_since = process, None
            elif wanted:
                self._spare = process
            self._changed.notify_all()
        if not wanted:
            process.kill()


def _end(*processes: ForkServer | ModelProcess | None) -> None:
    for process in processes:
        if isinstance(process, ModelProcess):
            process.kill()
        elif process:
            process.close()
