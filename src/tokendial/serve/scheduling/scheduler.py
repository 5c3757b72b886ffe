"""The scheduler: which images run next, together, at which degree, and which are refused.

It has no clock and no threads. Every method gets the time as an argument, so that the same code
runs in the engine and in simulations.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tokendial.serve.scheduling.controller import (
    ControllerRules,
    DialState,
    Observation,
    RequestGroup,
    next_dial,
    plan_batches,
    pressure,
)
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.scheduling.requests import (
    Batch,
    QueuedRequest,
    RefusalReason,
    RequestRefusedError,
)
from tokendial.serve.scheduling.second_answers import SecondAnswers

_RATE_WINDOW_S = 1.0
"""Time constant, in seconds, of the average of arrivals."""
_MIN_RATE_PER_S = 0.01
"""Arrival rates below count as zero."""
_PATIENT_FACTOR = 2.0
"""A request that allows at least this multiple of the objective does not ask for the objective."""
_DIAL_INTERVAL_S = 0.02
"""Seconds between two decisions of the controller."""
_MIN_RETRY_S = 0.05


class Scheduler:
    """A bounded queue, earliest deadline first, and the dial.

    Invariants: `_waiting` is sorted by deadline and holds exactly the requests with waiting images.
    A request is admitted only if it and all requests behind it can still meet their deadlines at
    the fastest degree; so at the moment of admission every promise can be kept.
    """

    def __init__(
        self,
        costs: CostModel,
        rules: ControllerRules,
        *,
        max_queue: int = 512,
        max_wait_s: float = 0.002,
        second_answers: SecondAnswers | None = None,
    ) -> None:
        """Create a scheduler whose dial is at the lowest degree.

        Args:
            costs: Predicts the time of batches; it learns from the batches that run.
            rules: Settings of the controller.
            max_queue: Maximum number of waiting images.
            max_wait_s: Seconds that an incomplete batch may wait for more images.
            second_answers: The queue of a cascade, if there is only one model and it has one.
        """
        self.costs, self.rules = costs, rules
        self.second_answers = second_answers
        self.max_queue, self.max_wait_s = max_queue, max_wait_s
        self.dial = DialState(rules.degrees[0])
        self.refused: Counter[RefusalReason] = Counter()
        """Number of refused images by reason."""
        self.draining = False
        """Whether new requests are refused because the server is stopping."""
        self.busy_until = -math.inf
        """Expected end of the running batch."""
        self._waiting: list[QueuedRequest] = []
        self._rates: dict[RequestGroup, _ArrivalRate] = {}
        self._last_hurried: dict[RequestGroup, float] = {}
        """Time at which the last request arrived that asks for about the objective, or less."""
        self._last_decision = -math.inf
        self._update_plan()

    def admit(self, request: QueuedRequest, now: float) -> None:
        """Put a request into the queue.

        Raises:
            RequestRefusedError: If too many images wait, the deadline cannot be met, or the server
                is stopping.
        """
        self.check(request, now)
        self._count_arrival(request, now)
        if not self._waiting:
            request.idle_degree = self.dial.degree
        insort(self._waiting, request, key=lambda waiting: waiting.deadline)

    def check(self, request: QueuedRequest, now: float, *, ahead: int = 0) -> None:
        """Raise the error that `admit` would raise.

        Args:
            request: The request to check; it is not put into the queue.
            now: The time.
            ahead: Number of similar images that will be admitted first.
        """
        try:
            self._check(request, now, ahead)
        except RequestRefusedError as refused:
            self._count_arrival(request, now)
            self.refused[refused.reason] += len(request.images)
            raise

    def next(self, now: float) -> Batch | float:
        """Return the batch to run now, or the seconds to wait unless new requests arrive."""
        self.drop_expired(now)
        self._update_dial(now)
        if again := self._second_batch(now):
            return again
        if not self._waiting:
            return math.inf
        head = self._waiting[0]
        degree = self._degree_for(head, now)
        size = self._batch_size(head, degree, now)
        parts = tuple(self._batch_parts(head, degree, size))
        if wait := self._seconds_to_wait(head, size - len(parts), now):
            return wait
        for request, _ in parts:
            request.num_started += 1
            request.started_degree = degree
        self._waiting = [request for request in self._waiting if request.num_waiting]
        self.busy_until = now + self.costs.seconds(head.name, degree, len(parts))
        if self.second_answers:
            ended = now + self.costs.upper_bound(head.name, degree, len(parts))
            self.second_answers.drop_late(ended, self.costs)
        return Batch(head.name, degree, parts)

    def finish(self, batch: Batch, seconds: float | None, now: float) -> None:
        """Record that a batch has ended after `seconds`; None if it failed."""
        if seconds is not None:
            self.costs.observe(batch.name, batch.degree, len(batch.parts), seconds)
        self.busy_until = now

    def drop_expired(self, now: float) -> None:
        """Remove cancelled requests, and refuse those that can no longer be answered in time."""
        remaining: list[QueuedRequest] = []
        for request in self._waiting:
            if request.owner.cancelled():
                continue
            # An admitted request was promised an answer. So it is given up by the expected time,
            # not already by the upper bound.
            fastest = self._fastest_degree(request)
            if now + self._seconds(request, fastest, cautious=False) > request.deadline:
                message = "the machine took longer than expected: the deadline cannot be met."
                error = RequestRefusedError("late", message, self._retry_s(remaining))
                self._refuse(request, error)
                continue
            remaining.append(request)
        self._waiting = remaining
        if self.second_answers:
            self.second_answers.drop_late(now, self.costs)

    def give_up(self, request: QueuedRequest, error: Exception) -> None:
        """Refuse a request of which some images run or have run."""
        self._waiting = [waiting for waiting in self._waiting if waiting is not request]
        if not request.owner.done():
            self._refuse(request, error)

    def observe(self, now: float) -> Observation:
        """Describe the load for the controller."""
        rates = {group: rate.at(now) for group, rate in self._rates.items()}
        arrivals = {group: rate for group, rate in rates.items() if rate > _MIN_RATE_PER_S}
        # Deadlines are rounded to tenths of the objective, so that a long queue is summed quickly.
        step_s = self.rules.slo_s / 10
        waiting: Counter[tuple[int, RequestGroup]] = Counter()
        for request in self._waiting:
            step = int((request.deadline - now) / step_s)
            waiting[step, request.group] += request.num_waiting
        return Observation(
            now,
            arrivals,
            [(group, images, step_s * (step + 0.5)) for (step, group), images in waiting.items()],
            [
                group
                for group in rates
                if now - self._last_hurried.get(group, -math.inf) > self.rules.lower_after_s
            ],
        )

    def utilisation(self, now: float, degree: int | None = None) -> float:
        """Fraction of the time that the arrivals need with the dial at `degree`.

        Above 1, the queue grows. None takes the present degree.
        """
        arrivals = replace(self.observe(now), waiting=())
        degree = self.dial.degree if degree is None else degree
        return pressure(degree, arrivals, self._plan, self.rules)

    @property
    def queued(self) -> int:
        """Number of waiting images."""
        return sum(request.num_waiting for request in self._waiting)

    def _count_arrival(self, request: QueuedRequest, now: float) -> None:
        rate = self._rates.setdefault(request.group, _ArrivalRate(now))
        rate.add(len(request.images), now)
        if request.deadline - now < _PATIENT_FACTOR * self.rules.slo_s:
            self._last_hurried[request.group] = now

    def _refuse(self, request: QueuedRequest, error: Exception) -> None:
        if isinstance(error, RequestRefusedError):
            self.refused[error.reason] += len(request.images)
        request.owner.refuse(error)

    def _check(self, request: QueuedRequest, now: float, ahead: int) -> None:
        if self.draining:
            raise RequestRefusedError("draining", "the server is stopping.", 1.0)
        images, queued = len(request.images), self.queued + ahead
        if queued + images > self.max_queue:
            message = (
                f"{queued} images wait and {images} arrived, at most {self.max_queue} may wait."
            )
            raise RequestRefusedError("full", message, self._retry_s(self._waiting))
        sooner = [other for other in self._waiting if other.deadline <= request.deadline]
        degree = self._fastest_degree(request)
        free = (
            max(self.busy_until, now) + ahead * self._plan[request.name, degree].seconds_per_image
        )
        # If nothing is ahead, a wrong estimate harms no other request, and running the batch is
        # the only way to correct it. So the expected time is enough then.
        idle = not queued and free == now
        done = free + self._work(sooner) + self._seconds(request, degree, queued, cautious=not idle)
        if done > request.deadline:
            message = (
                f"the answer would take {1000 * (done - now):.0f} ms, "
                f"{1000 * (request.deadline - now):.0f} ms are left."
            )
            raise RequestRefusedError("late", message, self._retry_s(sooner))
        # The requests behind the new one were promised an answer in time.
        done = free + self._work([*sooner, request])
        for other in self._waiting[len(sooner) :]:
            done += self._work([other])
            if done > other.deadline:
                message = "with a deadline this short, other requests would miss theirs."
                raise RequestRefusedError("late", message, self._retry_s(self._waiting))

    def _update_dial(self, now: float) -> None:
        if now - self._last_decision >= _DIAL_INTERVAL_S:
            if not self._waiting:
                self.costs.decay(now - self._last_decision)
            self._update_plan()
            load = self.observe(now)
            self.dial = next_dial(self.dial, load, self._plan, self.rules)
            if self.second_answers:
                self._turn_second_dial(self.second_answers, load)
            self._last_decision = now

    def _turn_second_dial(self, second_answers: SecondAnswers, load: Observation) -> None:
        (name,) = {name for name, _ in self._plan}
        spare = self.rules.raise_above - pressure(self.dial.degree, load, self._plan, self.rules)
        arrivals = load.arrivals_per_s.get((name, None), 0.0)
        second_answers.turn(spare, arrivals, name, self._plan)

    def _second_batch(self, now: float) -> Batch | None:
        """The batch of second answers to run now, if there is one."""
        if not self.second_answers:
            return None
        found = self.second_answers.take(
            now,
            self.costs,
            self._plan,
            idle=not self._waiting,
            allowed_s=lambda: self._spare_seconds(now),
        )
        if not found:
            return None
        name, degree = found[0].request.name, found[0].degree
        self.busy_until = now + self.costs.seconds(name, degree, len(found))
        parts = tuple((image.request, image.index) for image in found)
        return Batch(name, degree, parts, again=True)

    def _spare_seconds(self, now: float) -> float:
        """Seconds by which all waiting requests may be delayed without raising the degree."""
        spare, work = math.inf, 0.0
        for request in self._waiting:
            degree = self.dial.degree if request.fixed_degree is None else request.fixed_degree
            work += self._plan[request.name, degree].seconds_per_image * request.num_waiting
            spare = min(spare, request.deadline - now - work / self.rules.raise_above)
        return spare

    def _update_plan(self) -> None:
        self._plan = plan_batches(self.costs, self.rules)
        self._fastest = {
            name: min(
                self.rules.degrees, key=lambda degree: self._plan[name, degree].seconds_per_image
            )
            for name, _ in self._plan
        }

    def _degree_for(self, request: QueuedRequest, now: float) -> int:
        """Fixed degree, else the dial's, or the lowest higher one that meets the deadline."""
        if request.fixed_degree is not None:
            return request.fixed_degree
        lowest = self.dial.degree
        if request.idle_degree is not None and len(self._waiting) == 1:
            lowest = min(lowest, request.idle_degree)
        for degree in self.rules.degrees:
            late = now + self._seconds(request, degree) > request.deadline
            if degree >= lowest and not late:
                return degree
        return self._fastest_degree(request)

    def _batch_size(self, head: QueuedRequest, degree: int, now: float) -> int:
        """Number of images that can run together such that the first deadline is met."""
        images = self._plan[head.name, degree].images
        time_left = head.deadline - now
        while images > 1 and self.costs.upper_bound(head.name, degree, images) > time_left:
            images //= 2
        return images

    def _batch_parts(
        self, head: QueuedRequest, degree: int, size: int
    ) -> Iterator[tuple[QueuedRequest, int]]:
        found = 0
        # If the degree was raised above the dial to meet the head's deadline, requests without a
        # fixed degree may join it; if the head has a fixed degree, they keep the dial's.
        free_degree = degree if head.fixed_degree is None else self.dial.degree
        for request in self._waiting:
            fixed = request.fixed_degree
            wanted = free_degree if fixed is None else fixed
            if request.name != head.name or wanted != degree:
                continue
            for index in range(request.num_started, len(request.images)):
                if found == size:
                    return
                found += 1
                yield request, index

    def _seconds_to_wait(self, head: QueuedRequest, room: int, now: float) -> float:
        """Seconds to wait for more images; 0 if none are likely, or a deadline would suffer."""
        if room <= 0 or self.draining:
            return 0.0
        wait = head.arrived + self.max_wait_s - now
        expected = self._rates[head.name, head.degree].at(now) * self.max_wait_s
        spare = head.deadline - now - self._seconds(head, self._fastest_degree(head))
        return wait if expected >= 1 and 0 < wait < spare else 0.0

    def _work(self, requests: Iterable[QueuedRequest]) -> float:
        """Seconds for the waiting images of requests, in full batches at their fastest degrees."""
        return sum(
            self._plan[request.name, self._fastest_degree(request)].seconds_per_image
            * request.num_waiting
            for request in requests
        )

    def _seconds(
        self, request: QueuedRequest, degree: int, others: int = 0, *, cautious: bool = True
    ) -> float:
        """Seconds for the waiting images of a request.

        Args:
            request: The request.
            degree: Degree that it runs at.
            others: Number of other images that may fill up its last batch.
            cautious: Whether to take the upper bound instead of the expected time.
        """
        largest = self._plan[request.name, degree]
        batches, rest = divmod(request.num_waiting, largest.images)
        rest = min(rest + others, largest.images)
        predict = self.costs.upper_bound if cautious else self.costs.seconds
        seconds = batches * predict(request.name, degree, largest.images)
        return seconds + (predict(request.name, degree, rest) if rest else 0.0)

    def _fastest_degree(self, request: QueuedRequest) -> int:
        """Fixed degree of the request, else the fastest degree that the dial may take."""
        if request.fixed_degree is not None:
            return request.fixed_degree
        return self._fastest[request.name]

    def _retry_s(self, requests: Iterable[QueuedRequest]) -> float:
        """Seconds after which these requests will have been answered."""
        return max(self._work(requests), _MIN_RETRY_S)


class _ArrivalRate:
    """Images per second, averaged with exponentially decaying weights."""

    def __init__(self, now: float) -> None:
        self._sum, self._now = 0.0, now

    def add(self, images: int, now: float) -> None:
        self._sum = self._decayed_sum(now) + images
        self._now = now

    def at(self, now: float) -> float:
        return self._decayed_sum(now) / _RATE_WINDOW_S

    def _decayed_sum(self, now: float) -> float:
        return self._sum * math.exp(-(now - self._now) / _RATE_WINDOW_S)
