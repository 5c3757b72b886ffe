"""The engine: one thread that runs a model for whoever asks, batch after batch; free of HTTP."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tokendial.serve.scheduling.scheduler import Batch, Reason, Refused, Scheduler, Ticket

_log = logging.getLogger(__name__)
_IDLE_S = 0.1
"""How often the dial is looked at while nothing comes."""

_LOOK_S = 0.05
"""How often a batch that should have ended is looked at."""
_GRACE = 0.1
"""Share of its time by which an answer may be late before its request is given up."""
_TRIES = 2
"""Of a batch: it may be the batch that kills what runs it."""
_USELESS_S = 30.0
"""After so long without anything to run batches, starting the whole server again may help."""

T = TypeVar("T")
Run = Callable[[str, int, Sequence[Any]], Sequence[Any]]
"""Runs a batch: told the model's name, the degree and the payloads; gives an output for each."""


class LostError(RuntimeError):
    """What runs batches was lost with the one that it had; another try may succeed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one image."""

    output: Any
    """What `run` gave for it."""
    degree: int
    """That it was run at."""
    batch: int
    """Images that ran together."""
    queue_s: float
    """Seconds that it waited."""
    compute_s: float
    """Seconds of its batch."""


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch that has run, for those who watch."""

    name: str
    degree: int
    images: int
    waited_s: tuple[float, ...]
    """Of each image."""
    compute_s: float
    dial: int
    """Where the dial is."""
    queued: int
    """Images that wait now."""


@dataclass(frozen=True, slots=True)
class Status:
    """What goes on at a moment."""

    degree: int
    """Where the dial is."""
    queued: int
    """Images that wait."""
    running: int
    """Images in the model."""
    arrivals_per_s: float
    """Images that were asked for lately, refused ones included."""
    utilisation: float
    """Share of the time that is needed at this degree; above 1: the queue grows."""
    answered: int
    """Images, since the start."""
    refused: Mapping[Reason, int]
    """Images, since the start."""


class Engine:
    """Takes requests from any thread, and runs them in its own."""

    def __init__(
        self,
        run: Run,
        scheduler: Scheduler,
        *,
        on_batch: Callable[[BatchDone], None] | None = None,
        missing_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an engine; `start` starts it.

        Args:
            run: Called in the engine's thread only. After a `LostError` it is called once more.
            scheduler: Belongs to the engine from now on.
            on_batch: Called after each batch in the engine's thread; has to be quick.
            missing_s: Seconds for which nothing has been there to run batches, 0: there is; for any
                thread.
            clock: Seconds, never going back.
        """
        self._missing_s = missing_s
        self._run, self._scheduler, self._clock = run, scheduler, clock
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="tokendial-engine", daemon=True)
        self._running: Sequence[tuple[Ticket, int]] = ()
        self._answered = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        threading.Thread(
            target=self._keep_deadlines, name="tokendial-deadlines", daemon=True
        ).start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests should come."""
        return self.alive and not self.draining and not self._missing_s()

    @property
    def useful(self) -> bool:
        """Whether it runs, and can be expected to go on."""
        return (self.alive or self.draining) and self._missing_s() < _USELESS_S

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._scheduler.draining

    def submit(
        self,
        name: str,
        payloads: Sequence[Any],
        *,
        degree: int | None = None,
        within_s: float | None = None,
    ) -> Future[list[Answer]]:
        """Ask for some images, which are answered together.

        Args:
            name: Of the model.
            payloads: What `run` takes, at least one.
            degree: Of the dial; None: the controller's, which is raised where only that makes the
                deadline.
            within_s: Seconds from now in which the answer is of use; None: the service-level
                objective.

        Returns:
            An answer for each image, in order. Cancelling it takes the images out of the queue. It
            fails with `Refused` if the machine turns out to be slower than expected, and with what
            `run` raised.

        Raises:
            Refused: If too much waits, it could not be answered in time, or the engine drains.
        """
        if not payloads:
            raise ValueError("payloads must hold at least one image.")
        now = self._clock()
        seconds = self._scheduler.rules.slo_s if within_s is None else within_s
        asked = _Asked(len(payloads))
        ticket = Ticket(name, payloads, degree, now, now + seconds, owner=asked)
        with self._changed:
            if not self.alive:
                raise Refused("draining", "the engine does not run.", 1.0)
            self._scheduler.admit(ticket, now)
            self._changed.notify()
        return asked.future

    def check(
        self,
        name: str,
        images: int,
        *,
        degree: int | None = None,
        within_s: float | None = None,
        ahead: int = 0,
    ) -> None:
        """Raise what `submit` would, while preparing the images can still be spared.

        Args:
            name: Of the model.
            images: How many.
            degree: Of the dial; None: the controller's.
            within_s: Seconds from now in which the answer is of use; None: the service-level
                objective.
            ahead: Images that are being prepared, and will be submitted first.

        Raises:
            Refused: As `submit` does.
        """
        now = self._clock()
        seconds = self._scheduler.rules.slo_s if within_s is None else within_s
        ticket = Ticket(name, [None] * images, degree, now, now + seconds, owner=None)
        with self._changed:
            self._scheduler.check(ticket, now, ahead=ahead)

    def seconds(self, name: str, degree: int, images: int = 1) -> float:
        """What a batch takes here, by what has been measured so far."""
        with self._changed:
            return self._scheduler.costs.seconds(name, degree, images)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something in the engine's thread between two batches; the future is its result.

        Raises:
            Refused: If the engine drains.
        """
        future: Future[T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self.draining or not self.alive:
                raise Refused("draining", "the server is stopping.", 1.0)
            self._calls.put(do)
            self._changed.notify()
        return future

    def status(self) -> Status:
        """What goes on now."""
        with self._changed:
            scheduler, now = self._scheduler, self._clock()
            return Status(
                scheduler.dial.degree,
                scheduler.queued,
                len(self._running),
                sum(scheduler.observed(now).arrivals_per_s.values()),
                scheduler.utilisation(now),
                self._answered,
                Counter(scheduler.refused),
            )

    def utilisation(self, degree: int) -> float:
        """Share of the time that arrivals would need with the dial at `degree`."""
        with self._changed:
            return self._scheduler.utilisation(self._clock(), degree)

    def drain(self, timeout_s: float) -> bool:
        """Refuse what comes from now on, answer what was taken in, end the thread.

        Returns:
            Whether it has ended in time.
        """
        with self._changed:
            self._scheduler.draining = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self.alive

    def _loop(self) -> None:
        while True:
            self._do_calls()
            with self._changed:
                found = self._scheduler.next(self._clock())
                if not isinstance(found, Batch):
                    if self._calls.empty():
                        if self.draining and not self._scheduler.queued:
                            return
                        self._changed.wait(min(found, _IDLE_S))
                    continue
                self._running = found.parts
            self._work(found)

    def _keep_deadlines(self) -> None:
        """Refuse in time what cannot be answered any more, whatever a batch takes."""
        while self.alive:
            time.sleep(_LOOK_S)
            with self._changed:
                now, scheduler = self._clock(), self._scheduler
                if not self._running or now <= scheduler.busy_until:
                    continue
                scheduler.drop(now)
                told = Refused("late", "the machine took longer than expected.", _LOOK_S)
                for ticket in {ticket for ticket, _ in self._running}:
                    late_s = now - ticket.deadline
                    if late_s > _GRACE * (ticket.deadline - ticket.arrived):
                        scheduler.give_up(ticket, told)

    def _do_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def _work(self, batch: Batch) -> None:
        payloads = [ticket.payloads[place] for ticket, place in batch.parts]
        began = self._clock()
        outputs, failed = self._outputs(batch, payloads)
        ended = self._clock()
        with self._changed:
            scheduler = self._scheduler
            self._running = ()
            if failed:
                scheduler.finished(batch, None, ended)
                for ticket in {ticket for ticket, _ in batch.parts}:
                    scheduler.give_up(ticket, failed)
            else:
                scheduler.finished(batch, ended - began, ended)
                self._answered += len(payloads)
            queued, dial = scheduler.queued, scheduler.dial.degree
        waited = tuple(began - ticket.arrived for ticket, _ in batch.parts)
        if failed:
            return
        for (ticket, place), output, seconds in zip(batch.parts, outputs, waited, strict=True):
            answer = Answer(output, batch.degree, len(payloads), seconds, ended - began)
            ticket.owner.answer(place, answer)
        if self._on_batch:
            self._on_batch(
                BatchDone(
                    batch.name, batch.degree, len(payloads), waited, ended - began, dial, queued
                )
            )

    def _outputs(
        self, batch: Batch, payloads: Sequence[Any]
    ) -> tuple[Sequence[Any], Exception | None]:
        """What a batch gives, or why it gives nothing."""
        for _ in range(_TRIES):
            try:
                return self._run(batch.name, batch.degree, payloads), None
            except LostError as error:
                _log.error("lost with a batch of %d images: %s", len(payloads), error)
            except Refused as refused:
                return (), refused
            except Exception as error:
                _log.exception("a batch of %d images failed", len(payloads))
                return (), error
            if all(ticket.owner.ended() for ticket, _ in batch.parts):
                break
        told = "the process of the models was lost with these images, and again with another try."
        return (), Refused("lost", told, 1.0)


class _Asked:
    """The answers to a request, as they come."""

    def __init__(self, images: int) -> None:
        self.future: Future[list[Answer]] = Future()
        self._answers: dict[int, Answer] = {}
        self._images = images

    def answer(self, place: int, answer: Answer) -> None:
        self._answers[place] = answer
        if len(self._answers) == self._images:
            answers = [self._answers[each] for each in range(self._images)]
            self._end(lambda: self.future.set_result(answers))

    def gone(self) -> bool:
        return self.future.cancelled()

    def ended(self) -> bool:
        return self.future.done()

    def refuse(self, error: Exception) -> None:
        self._end(lambda: self.future.set_exception(error))

    def _end(self, end: Callable[[], None]) -> None:
        # It may have been cancelled, or have failed with another of its batches.
        with suppress(InvalidStateError):
            end()
