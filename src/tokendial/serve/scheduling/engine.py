"""The engine: a thread that takes batches from the scheduler and runs them. It knows no HTTP."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tokendial.serve.scheduling.requests import (
    Batch,
    QueuedRequest,
    RefusalReason,
    RequestRefusedError,
)
from tokendial.serve.scheduling.scheduler import Scheduler
from tokendial.serve.scheduling.second_answers import CascadeStatus

_log = logging.getLogger(__name__)
_IDLE_WAIT_S = 0.1
"""Longest pause of the idle engine between two decisions of the controller."""
_DEADLINE_CHECK_S = 0.05
"""Seconds between two looks at a batch that should have ended."""
_LATE_TOLERANCE = 0.1
"""Fraction of its allowed time by which an answer may be late before its request is given up."""
_BATCH_ATTEMPTS = 2
"""How often a batch is run if the model process is lost: the batch itself may be the cause."""
_UNHEALTHY_AFTER_S = 30.0
"""Seconds without a model process after which restarting the whole server may help."""
_STUCK_FACTOR = 10.0
"""A batch may take this multiple of its upper bound before its process counts as stuck."""
_MIN_STUCK_S = 2.0
"""Shortest time, in seconds, after which a process counts as stuck."""

T = TypeVar("T")
BatchFunction = Callable[[str, int, Sequence[Any], float], Sequence[Any]]
"""Runs a batch: takes the model's name, the degree, the images, and the seconds after which the
batch counts as stuck. Returns one output per image."""


class WorkerLostError(RuntimeError):
    """The process that ran a batch was lost; running the batch again may succeed."""


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Result of one image."""

    output: Any
    """Output of the batch function for the image."""
    degree: int
    """Degree that the image was run at."""
    batch: int
    """Number of images in its batch."""
    queue_s: float
    """Seconds that the image waited in the queue."""
    compute_s: float
    """Seconds that its batch ran; of an image with a second answer, both."""
    unsure_at: tuple[int, ...] = ()
    """Degrees at which the model was not sure enough of its answer. If `degree` is among them,
    there was no time for a second answer."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that has run, as reported to `on_batch`."""

    name: str
    """Name of the model."""
    degree: int
    """Degree of the batch."""
    images: int
    """Number of images in the batch."""
    waited_s: tuple[float, ...]
    """Seconds that each image waited in the queue."""
    compute_s: float
    """Seconds that the batch ran."""
    dial: int
    """Degree of the dial after the batch."""
    queued: int
    """Number of images that wait after the batch."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State of the engine at one moment."""

    degree: int
    """Degree of the dial."""
    queued: int
    """Number of waiting images."""
    running: int
    """Number of images in the running batch."""
    arrivals_per_s: float
    """Images that arrived per second lately, including refused ones."""
    utilisation: float
    """Fraction of the time that the arrivals need at this degree; above 1, the queue grows."""
    answered: int
    """Number of answered images since the start."""
    refused: Mapping[RefusalReason, int]
    """Number of refused images since the start, by reason."""
    cascade: CascadeStatus | None = None
    """State of the cascade, if there is one."""


class Engine:
    """Accepts requests from any thread and runs their batches in a thread of its own.

    Invariant: the scheduler and `_running` are only touched while `_changed` is held. The batch
    function runs without it, so that requests can be admitted while a batch runs.
    """

    def __init__(
        self,
        run: BatchFunction,
        scheduler: Scheduler,
        *,
        on_batch: Callable[[BatchReport], None] | None = None,
        how_sure: Callable[[Sequence[Any], Sequence[Any]], Sequence[float]] | None = None,
        missing_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an engine; `start` starts its threads.

        Args:
            run: Runs a batch; called in the engine's thread only. It is called a second time after
                a `WorkerLostError`.
            scheduler: The scheduler; it belongs to the engine from now on.
            on_batch: Called after each batch in the engine's thread. It must return quickly.
            how_sure: Returns how sure the model is of each output of a batch; takes the images and
                the outputs. Needed if the scheduler gives second answers.
            missing_s: Returns for how many seconds there has been no model process, 0 if there is
                one. It may be called from any thread.
            clock: Returns the time in seconds; must never go back.
        """
        self._missing_s = missing_s
        self._run, self._scheduler, self._clock = run, scheduler, clock
        self._on_batch, self._how_sure = on_batch, how_sure
        self._changed = threading.Condition()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="tokendial-engine", daemon=True)
        self._running: Batch | None = None
        self._answered = 0

    def start(self) -> None:
        """Start the engine's threads."""
        self._thread.start()
        threading.Thread(
            target=self._enforce_deadlines, name="tokendial-deadlines", daemon=True
        ).start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests should be sent to this server."""
        return self.alive and not self.draining and not self._missing_s()

    @property
    def healthy(self) -> bool:
        """Whether this server can be expected to go on; if not, it should be restarted."""
        return (self.alive or self.draining) and self._missing_s() < _UNHEALTHY_AFTER_S

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is stopping."""
        return self._scheduler.draining

    def submit(
        self,
        name: str,
        images: Sequence[Any],
        *,
        degree: int | None = None,
        within_s: float | None = None,
    ) -> Future[list[ImageResult]]:
        """Queue the images of one request.

        Args:
            name: Name of the model.
            images: Images as the batch function takes them, at least one.
            degree: Degree to run at. None takes the degree of the dial, or a higher one where only
                that meets the deadline.
            within_s: Seconds from now until the deadline; None: the latency objective.

        Returns:
            A future of one result per image, in order. Cancelling it removes the images from the
            queue. It fails with `RequestRefusedError` if the machine turns out to be slower than
            expected, and with the error of the batch function.

        Raises:
            RequestRefusedError: If too many images wait, the deadline cannot be met, or the engine
                is stopping.
        """
        if not images:
            raise ValueError("images must hold at least one image.")
        pending = _PendingResults(len(images))
        request = self._request(name, images, degree, within_s, pending)
        with self._changed:
            if not self.alive:
                raise RequestRefusedError("draining", "the engine does not run.", 1.0)
            self._scheduler.admit(request, request.arrived)
            self._changed.notify()
        return pending.future

    def check(
        self,
        name: str,
        num_images: int,
        *,
        degree: int | None = None,
        within_s: float | None = None,
        ahead: int = 0,
    ) -> None:
        """Raise the error that `submit` would raise, before images are decoded in vain.

        Args:
            name: Name of the model.
            num_images: Number of images of the request.
            degree: Degree to run at; None: the degree of the dial.
            within_s: Seconds from now until the deadline; None: the latency objective.
            ahead: Number of images that are being decoded and will be submitted first.

        Raises:
            RequestRefusedError: As `submit` does.
        """
        request = self._request(name, [None] * num_images, degree, within_s, owner=None)
        with self._changed:
            self._scheduler.check(request, request.arrived, ahead=ahead)

    def seconds(self, name: str, degree: int, images: int = 1) -> float:
        """Expected seconds of a batch on this machine."""
        with self._changed:
            return self._scheduler.costs.seconds(name, degree, images)

    def call_between_batches(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the engine's thread while no batch runs; return its future result.

        Raises:
            RequestRefusedError: If the engine is stopping.
        """
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self.draining or not self.alive:
                raise RequestRefusedError("draining", "the server is stopping.", 1.0)
            self._calls.put(call)
            self._changed.notify()
        return future

    def status(self) -> EngineStatus:
        """Return the present state."""
        with self._changed:
            scheduler, now = self._scheduler, self._clock()
            return EngineStatus(
                scheduler.dial.degree,
                scheduler.queued,
                len(self._running.parts) if self._running else 0,
                sum(scheduler.observe(now).arrivals_per_s.values()),
                scheduler.utilisation(now),
                self._answered,
                Counter(scheduler.refused),
                scheduler.second_answers.status if scheduler.second_answers else None,
            )

    def utilisation(self, degree: int) -> float:
        """Fraction of the time that the arrivals would need with the dial at `degree`."""
        with self._changed:
            return self._scheduler.utilisation(self._clock(), degree)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, answer the admitted ones, then end the thread.

        Returns:
            Whether the thread has ended within `timeout_s`.
        """
        with self._changed:
            self._scheduler.draining = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self.alive

    def _request(
        self,
        name: str,
        images: Sequence[Any],
        degree: int | None,
        within_s: float | None,
        owner: "_PendingResults | None",
    ) -> QueuedRequest:
        now = self._clock()
        within_s = self._scheduler.rules.slo_s if within_s is None else within_s
        return QueuedRequest(name, images, degree, now, now + within_s, owner)

    def _loop(self) -> None:
        while True:
            while not self._calls.empty():
                self._calls.get()()
            with self._changed:
                found = self._scheduler.next(self._clock())
                if not isinstance(found, Batch):
                    if self._calls.empty():
                        if self.draining and not self._scheduler.queued:
                            return
                        self._changed.wait(min(found, _IDLE_WAIT_S))
                    continue
                self._running = found
                upper_bound_s = self._scheduler.costs.upper_bound(
                    found.name, found.degree, len(found.parts)
                )
            self._run_batch(found, max(_STUCK_FACTOR * upper_bound_s, _MIN_STUCK_S))

    def _enforce_deadlines(self) -> None:
        """Refuse what can no longer be answered in time, even while a batch does not end."""
        while self.alive:
            time.sleep(_DEADLINE_CHECK_S)
            with self._changed:
                now, scheduler = self._clock(), self._scheduler
                if not self._running or now <= scheduler.busy_until:
                    continue
                scheduler.drop_expired(now)
                message = "the machine took longer than expected."
                error = RequestRefusedError("late", message, _DEADLINE_CHECK_S)
                late = [part for part in self._running.parts if _is_late(part[0], now)]
                self._give_up(late, error, again=self._running.again)

    def _give_up(
        self, parts: Iterable[tuple[QueuedRequest, int]], error: Exception, *, again: bool
    ) -> None:
        """Refuse the requests of some images. Images that run again keep their first answers."""
        for request, index in parts:
            if again:
                request.owner.keep_answer(index)
            else:
                self._scheduler.give_up(request, error)

    def _run_batch(self, batch: Batch, limit_s: float) -> None:
        images = [request.images[index] for request, index in batch.parts]
        began = self._clock()
        outputs, error = self._try_batch(batch, images, limit_s)
        ended = self._clock()
        compute_s = ended - began
        if error:
            with self._changed:
                self._running = None
                self._scheduler.finish(batch, None, ended)
                self._give_up(batch.parts, error, again=batch.again)
            return
        second = self._scheduler.second_answers
        judged = second is not None and second.may_follow(batch.degree)
        sure = self._how_sure(images, outputs) if self._how_sure and judged else ()
        waited_s = tuple(began - request.arrived for request, _ in batch.parts)
        results = [
            request.owner.joined(
                index, ImageResult(output, batch.degree, len(images), queue_s, compute_s)
            )
            for (request, index), output, queue_s in zip(
                batch.parts, outputs, waited_s, strict=True
            )
        ]
        with self._changed:
            scheduler = self._scheduler
            self._running = None
            scheduler.finish(batch, compute_s, ended)
            self._answered += 0 if batch.again else len(images)
            final = self._hold_unsure(batch, results, sure, ended)
            queued, dial = scheduler.queued, scheduler.dial.degree
        for (request, index), result in zip(batch.parts, final, strict=True):
            if result:
                request.owner.set_result(index, result)
        if self._on_batch:
            self._on_batch(
                BatchReport(
                    batch.name, batch.degree, len(images), waited_s, compute_s, dial, queued
                )
            )

    def _hold_unsure(
        self, batch: Batch, results: Sequence[ImageResult], sure: Sequence[float], now: float
    ) -> list[ImageResult | None]:
        """Let the owners of images that get a second answer hold the first one.

        Args:
            batch: The batch.
            results: Its results.
            sure: How sure the model is of each; empty without a cascade.
            now: The time.

        Returns:
            The results; None for an image whose answer is held.
        """
        final: list[ImageResult | None] = list(results)
        if (second := self._scheduler.second_answers) is None:
            return final
        verdicts = second.judge(batch, sure, now)
        for place, ((request, index), verdict) in enumerate(
            zip(batch.parts, verdicts, strict=True)
        ):
            if verdict == "sure":
                continue
            unsure_at = (*results[place].unsure_at, batch.degree)
            answer = replace(results[place], unsure_at=unsure_at)
            if verdict == "sent on":
                request.owner.hold(index, answer)
            final[place] = None if verdict == "sent on" else answer
        return final

    def _try_batch(
        self, batch: Batch, images: Sequence[Any], limit_s: float
    ) -> tuple[Sequence[Any], Exception | None]:
        """Run a batch, a second time if the process was lost; return the outputs or the error."""
        for _ in range(_BATCH_ATTEMPTS):
            try:
                return self._run(batch.name, batch.degree, images, limit_s), None
            except WorkerLostError as error:
                _log.error(
                    "the model process was lost with a batch of %d images: %s", len(images), error
                )
            except RequestRefusedError as refused:
                return (), refused
            except Exception as error:
                _log.exception("a batch of %d images failed", len(images))
                return (), error
            if all(request.owner.done() for request, _ in batch.parts):
                break
        message = "the model process was lost with these images, and again at a second attempt."
        return (), RequestRefusedError("lost", message, 1.0)


def _is_late(request: QueuedRequest, now: float) -> bool:
    """Whether an answer is so late that its request is given up."""
    late_s = now - request.deadline
    return late_s > _LATE_TOLERANCE * (request.deadline - request.arrived)


class _PendingResults:
    """Collects the results of one request until all of them are there."""

    def __init__(self, num_images: int) -> None:
        self.future: Future[list[ImageResult]] = Future()
        self._results: dict[int, ImageResult] = {}
        self._held: dict[int, ImageResult] = {}
        """Answers of images that may get a second one."""
        self._num_images = num_images

    def joined(self, index: int, result: ImageResult) -> ImageResult:
        """A result with the times and degrees of the image's first answer, if it has one."""
        if (first := self._held.get(index)) is None:
            return result
        return replace(
            result,
            queue_s=result.queue_s - first.compute_s,
            compute_s=first.compute_s + result.compute_s,
            unsure_at=first.unsure_at,
        )

    def hold(self, index: int, result: ImageResult) -> None:
        self._held[index] = result

    def keep_answer(self, index: int) -> None:
        """Take the answer that is held: there will be no second one."""
        self.set_result(index, self._held[index])

    def set_result(self, index: int, result: ImageResult) -> None:
        self._results[index] = result
        if len(self._results) == self._num_images:
            # The future may have been cancelled, or have failed with another batch.
            with suppress(InvalidStateError):
                self.future.set_result([self._results[each] for each in range(self._num_images)])

    def cancelled(self) -> bool:
        return self.future.cancelled()

    def done(self) -> bool:
        return self.future.done()

    def refuse(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)
