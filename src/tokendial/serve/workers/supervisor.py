"""Sees to it that there is a process that computes: one that is lost or stuck is replaced."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tokendial.errors import error_message
from tokendial.serve.scheduling.engine import LostError
from tokendial.serve.scheduling.scheduler import Refused
from tokendial.serve.workers.apart import LOOK_S, Apart, Loaded

_log = logging.getLogger(__name__)
_PATIENCE_S = 2.0
"""For a process that is being replaced."""
_SHOWS_S = 0.4
"""After so long without a sign of life a process is not counted on, though not yet given up."""
_FREE_LOSSES = 4
"""Processes that may be lost in a row and are replaced at once; from then on waits double."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_FORGIVEN_S = 30.0
"""After so long without a loss, the next one is the first."""

Starting = TypeVar("Starting", Loaded, Apart)


class Supervisor:
    """A process that computes, perhaps one to take its place, and the one they are forked from."""

    def __init__(
        self, load: Callable[[], Loaded], again: Callable[[], Loaded], *, spare: bool
    ) -> None:
        """Start them, and wait until one is ready to compute.

        Args:
            load: Starts a process that loads models.
            again: The same if that one is lost.
            spare: Whether to keep a second process ready to compute.

        Raises:
            ValueError: If models cannot be loaded, or a setting does not fit them.
            LostError: If a process ended meanwhile.
        """
        self._again, self._with_spare = again, spare
        self._changed = threading.Condition()
        self._look, self._closed = threading.Event(), False
        self._starting: list[Loaded | Apart] = []
        self._dead: list[tuple[Apart, str]] = []
        """Processes to be ended, and why."""
        self._loaded: Loaded | None = None
        self._current: Apart | None = None
        self._spare: Apart | None = None
        self._missing_since: float | None = None
        self._losses, self._lost_at, self._next_try = 0, 0.0, 0.0
        self._filler: threading.Thread | None = None
        loaded, self._current = self.start(load)
        self._loaded, self.facts = loaded, loaded.facts
        self._watcher = threading.Thread(target=self._watch, name="tokendial-watch", daemon=True)
        self._watcher.start()

    @property
    def missing_s(self) -> float:
        """Seconds for which no process has been at hand that computes; 0: there is one."""
        with self._changed:
            if self._missing_since is not None:
                return time.monotonic() - self._missing_since
            still_s = self._current.still_s if self._current else 0.0
            return still_s if still_s > _SHOWS_S else 0.0

    def process(self) -> Apart:
        """The one that computes.

        Raises:
            Refused: If there is none, and will be none for a while.
        """
        with self._changed:
            until = time.monotonic() + _PATIENCE_S
            while self._current is None:
                now = time.monotonic()
                if self._closed or now >= until or self._next_try > now:
                    told = "the process of the models was lost, another one is being started."
                    raise Refused("lost", told, max(1.0, self._next_try - now))
                self._changed.wait(until - now)
            return self._current

    def lost(self, process: Apart) -> None:
        """Somebody has noticed that one was lost."""
        with self._changed:
            self._give_up(process, "was lost")
        self._look.set()

    def start(self, load: Callable[[], Loaded]) -> tuple[Loaded, Apart]:
        """Other processes, to be exchanged for those that there are, or ended by whoever asks.

        Raises:
            ValueError: If models cannot be loaded, or a setting does not fit them.
            LostError: If a process ended meanwhile.
        """
        loaded = self._ready(load())
        try:
            return loaded, self._ready(loaded.fork())
        except BaseException:
            loaded.close()
            raise

    def exchange(self, again: Callable[[], Loaded], loaded: Loaded, process: Apart) -> None:
        """Let others take the place of the processes that there are, which are ended.

        Args:
            again: Starts a process that loads the same models.
            loaded: Of `start`.
            process: Of `start`.
        """
        with self._changed:
            old = (self._current, self._spare, self._loaded)
            self._again, self._loaded, self.facts = again, loaded, loaded.facts
            self._current, self._spare, self._missing_since = process, None, None
            self._changed.notify_all()
        _end(*old)

    def close(self) -> None:
        """End them; nothing can be run any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._look.set()
        # The one that is asked how others have ended first: it may stand still.
        _end(self._loaded, *self._starting, self._current, self._spare)
        self._watcher.join()
        if self._filler:
            self._filler.join()

    def _ready(self, process: Starting) -> Starting:
        """It, when it is."""
        with self._changed:
            closed = self._closed
            self._starting.append(process)
        try:
            if closed:
                raise LostError("the server is stopping.")
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
            self._look.wait(LOOK_S)
            self._look.clear()
            with self._changed:
                for process in (*self._starting, self._current, self._spare):
                    if isinstance(process, Apart) and (why := process.trouble()):
                        self._give_up(process, why)
                dead, self._dead = self._dead, []
            for process, why in dead:
                code = process.kill()
                _log.error("a process of the models %s (%s).", why, code)
            with self._changed:
                if self._loaded and not self._loaded.alive:
                    self._loaded = None
                if self._lacks_one() and not (self._filler and self._filler.is_alive()):
                    self._filler = threading.Thread(target=self._fill, daemon=True)
                    self._filler.start()

    def _give_up(self, process: Apart, why: str) -> None:
        """Let the spare one take its place, if there is one; the watcher ends it."""
        if process is self._current:
            self._current, self._spare = self._spare, None
            if self._current is None:
                self._missing_since = time.monotonic()
        elif process is self._spare:
            self._spare = None
        elif process not in self._starting:
            return  # it was given up before
        self._dead.append((process, why))
        self._count_loss()
        self._changed.notify_all()

    def _count_loss(self) -> None:
        now = time.monotonic()
        self._losses = self._losses + 1 if now - self._lost_at < _FORGIVEN_S else 1
        self._lost_at = self._next_try = now
        if (more := self._losses - _FREE_LOSSES) > 0:
            self._next_try += min(_FIRST_WAIT_S * 2 ** (more - 1), _LONGEST_WAIT_S)

    def _lacks_one(self) -> bool:
        if self._closed or time.monotonic() < self._next_try:
            return False
        spare = self._spare or not self._with_spare
        return not (self._loaded and self._current and spare)

    def _fill(self) -> None:
        """Start one that is lacking."""
        loaded = self._loaded
        try:
            if loaded is None:
                _log.error("the process that held the models was lost: they are loaded again.")
                self._take_loaded(self._ready(self._again()))
            else:
                self._take(loaded, self._ready(loaded.fork()))
        except (ValueError, OSError, RuntimeError) as error:
            _log.error("no process could be started: %s", error_message(error))
            with self._changed:
                self._count_loss()

    def _take_loaded(self, loaded: Loaded) -> None:
        with self._changed:
            wanted = self._loaded is None and not self._closed
            if wanted:
                self._loaded, self.facts = loaded, loaded.facts
        if not wanted:  # those of a reload came first
            loaded.close()

    def _take(self, loaded: Loaded, process: Apart) -> None:
        with self._changed:
            wanted = loaded is self._loaded and not self._closed
            if wanted and self._current is None:
                self._current, self._missing_since = process, None
            elif wanted:
                self._spare = process
            self._changed.notify_all()
        if not wanted:
            process.kill()


def _end(*processes: Loaded | Apart | None) -> None:
    for process in processes:
        if isinstance(process, Apart):
            process.kill()
        elif process:
            process.close()
