"""Which requests run next, together, at which degree; which are refused. No clock, no threads.

Every method is told what time it is, so that the same code runs in the engine and in simulations.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokendial.serve.scheduling.controller import (
    Dial,
    Group,
    Observed,
    Rules,
    planned,
    pressure,
    turned,
)
from tokendial.serve.scheduling.costs import Costs

Reason = Literal["full", "late", "lost", "draining"]

_RATE_S = 1.0
"""Seconds over which arrivals are averaged."""
_NONE_PER_S = 0.01
"""Below, nothing comes any more."""
_PATIENT = 2.0
"""Objectives that a request has left which does not ask for the objective."""
_TURN_EVERY_S = 0.02
_SHORTEST_RETRY_S = 0.05


class Refused(Exception):  # noqa: N818 -- an outcome, nobody's mistake
    """A request that will not be answered; the message is one line for whoever asked."""

    def __init__(self, reason: Reason, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        """"full": too many wait; "late": its deadline cannot be made; "lost": what should run it
        was lost; "draining": at the end."""
        self.retry_after_s = retry_after_s
        """When it may be worth another try."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request: some images for one model."""

    name: str
    payloads: Sequence[Any]
    degree: int | None
    """Degree that it asked for; None: the dial's."""
    arrived: float
    deadline: float
    owner: Any
    """Whoever asked: `gone()` says whether nobody waits for it any more, `ended()` whether that or
    whether it was answered or refused; `refuse(error)` is called when it will not be answered."""
    begun: int = 0
    """Images that run or have run."""
    begun_at: int | None = None
    """Degree that they run at, and the others will: a request gets one."""
    calm_at: int | None = None
    """Where the dial was when it came, if nothing waited: its own images do not turn it up."""

    @property
    def left(self) -> int:
        """Images that wait."""
        return len(self.payloads) - self.begun

    @property
    def bound(self) -> int | None:
        """Degree that it has to run at; None: the dial's."""
        return self.degree if self.begun_at is None else self.begun_at

    @property
    def group(self) -> Group:
        """What it may run together with."""
        return self.name, self.bound


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that run together."""

    name: str
    degree: int
    parts: tuple[tuple[Ticket, int], ...]
    """The images: a ticket, and the place in its payloads."""


class Scheduler:
    """A bounded queue, first the earliest deadline, and the dial."""

    def __init__(
        self, costs: Costs, rules: Rules, *, max_queue: int = 512, max_wait_s: float = 0.002
    ) -> None:
        """Begin at the lowest degree.

        Args:
            costs: Of every batch; learns from those that run.
            rules: Of the controller.
            max_queue: Images that may wait.
            max_wait_s: How long a batch that is not full may wait for others to come.
        """
        self.costs, self.rules = costs, rules
        self.max_queue, self.max_wait_s = max_queue, max_wait_s
        self.dial = Dial(rules.degrees[0])
        self.refused: Counter[Reason] = Counter()
        """Images that were refused, by reason."""
        self.draining = False
        self.busy_until = -math.inf
        """When the batch that runs should end."""
        self._waiting: list[Ticket] = []
        self._rates: dict[Group, _Rate] = {}
        self._hurried: dict[Group, float] = {}
        """When the last one came that had about the time of the objective, or less."""
        self._turned = -math.inf
        self._replan()

    def admit(self, ticket: Ticket, now: float) -> None:
        """Take a request in.

        Raises:
            Refused: If too much waits, it cannot be answered before its deadline, or nothing is
                taken in any more.
        """
        self.check(ticket, now)
        self._count(ticket, now)
        if not self._waiting:
            ticket.calm_at = self.dial.degree
        insort(self._waiting, ticket, key=lambda waiting: waiting.deadline)

    def check(self, ticket: Ticket, now: float, *, ahead: int = 0) -> None:
        """Raise what `admit` would, if `ahead` images like these were still to come before it."""
        try:
            self._check(ticket, now, ahead)
        except Refused as refused:
            self._count(ticket, now)
            self.refused[refused.reason] += len(ticket.payloads)
            raise

    def _count(self, ticket: Ticket, now: float) -> None:
        self._rates.setdefault(ticket.group, _Rate(now)).add(len(ticket.payloads), now)
        if ticket.deadline - now < _PATIENT * self.rules.slo_s:
            self._hurried[ticket.group] = now

    def next(self, now: float) -> Batch | float:
        """The batch to run now, or for how many seconds there is none unless requests come."""
        self.drop(now)
        self._turn(now)
        if not self._waiting:
            return math.inf
        head = self._waiting[0]
        degree = self._degree_for(head, now)
        most = self._images_for(head, degree, now)
        parts = tuple(self._together(head, degree, most))
        if wait := self._worth_waiting(head, most - len(parts), now):
            return wait
        for ticket, _ in parts:
            ticket.begun += 1
            ticket.begun_at = degree
        self._waiting = [ticket for ticket in self._waiting if ticket.left]
        self.busy_until = now + self.costs.seconds(head.name, degree, len(parts))
        return Batch(head.name, degree, parts)

    def finished(self, batch: Batch, seconds: float | None, now: float) -> None:
        """A batch has run, for so many seconds; None: it has not come to its end."""
        if seconds is not None:
            self.costs.observe(batch.name, batch.degree, len(batch.parts), seconds)
        self.busy_until = now

    def drop(self, now: float) -> None:
        """Take those out whom nobody waits for, or who can no longer be answered in time."""
        kept: list[Ticket] = []
        for ticket in self._waiting:
            if ticket.owner.gone():
                continue
            # It has been promised an answer, so it is given up only when that is unlikely.
            if now + self._seconds(ticket, self._fastest_of(ticket), sure=False) > ticket.deadline:
                told = "the machine took longer than expected: the deadline cannot be made."
                self._refuse(ticket, Refused("late", told, self._retry_s(kept)))
                continue
            kept.append(ticket)
        self._waiting = kept

    def give_up(self, ticket: Ticket, error: Exception) -> None:
        """Refuse a request of which some images run or have run."""
        self._waiting = [waiting for waiting in self._waiting if waiting is not ticket]
        if not ticket.owner.ended():
            self._refuse(ticket, error)

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        if isinstance(error, Refused):
            self.refused[error.reason] += len(ticket.payloads)
        ticket.owner.refuse(error)

    def observed(self, now: float) -> Observed:
        """What the controller sees."""
        rates = {group: rate.at(now) for group, rate in self._rates.items()}
        arrivals = {group: rate for group, rate in rates.items() if rate > _NONE_PER_S}
        # Deadlines that lie close together count as one, so that a long queue is seen quickly.
        grain = self.rules.slo_s / 10
        waiting: Counter[tuple[int, Group]] = Counter()
        for ticket in self._waiting:
            waiting[int((ticket.deadline - now) / grain), ticket.group] += ticket.left
        return Observed(
            now,
            arrivals,
            [(group, images, grain * (step + 0.5)) for (step, group), images in waiting.items()],
            [
                group
                for group in rates
                if now - self._hurried.get(group, -math.inf) > self.rules.calm_s
            ],
        )

    def utilisation(self, now: float, degree: int | None = None) -> float:
        """Share of the time that arrivals need, with the dial at a degree.

        Above 1 the queue grows. None: the degree that the dial is at.
        """
        arrivals = replace(self.observed(now), waiting=())
        degree = self.dial.degree if degree is None else degree
        return pressure(degree, arrivals, self._plan, self.rules)

    @property
    def queued(self) -> int:
        """Images that wait."""
        return sum(ticket.left for ticket in self._waiting)

    def _check(self, ticket: Ticket, now: float, ahead: int) -> None:
        if self.draining:
            raise Refused("draining", "the server is stopping.", 1.0)
        images, queued = len(ticket.payloads), self.queued + ahead
        if queued + images > self.max_queue:
            told = f"{queued} images wait and {images} came, at most {self.max_queue} may wait."
            raise Refused("full", told, self._retry_s(self._waiting))
        sooner = [other for other in self._waiting if other.deadline <= ticket.deadline]
        degree = self._fastest_of(ticket)
        free = max(self.busy_until, now) + ahead * self._plan[ticket.name, degree].each
        # With nothing ahead a wrong guess harms nobody, and running it is how to learn better.
        idle = not queued and free == now
        done = free + self._work(sooner) + self._seconds(ticket, degree, queued, sure=not idle)
        if done > ticket.deadline:
            told = (
                f"the answer would take {1000 * (done - now):.0f} ms, "
                f"{1000 * (ticket.deadline - now):.0f} ms are left."
            )
            raise Refused("late", told, self._retry_s(sooner))
        # Those behind it were promised an answer in time.
        done = free + self._work([*sooner, ticket])
        for other in self._waiting[len(sooner) :]:
            done += self._work([other])
            if done > other.deadline:
                told = "with a deadline this short, others that wait would miss theirs."
                raise Refused("late", told, self._retry_s(self._waiting))

    def _turn(self, now: float) -> None:
        if now - self._turned >= _TURN_EVERY_S:
            if not self._waiting:
                self.costs.fade(now - self._turned)
            self._replan()
            self.dial = turned(self.dial, self.observed(now), self._plan, self.rules)
            self._turned = now

    def _replan(self) -> None:
        self._plan = planned(self.costs, self.rules)
        self._fastest = {
            name: min(self.rules.degrees, key=lambda degree: self._plan[name, degree].each)
            for name, _ in self._plan
        }

    def _degree_for(self, ticket: Ticket, now: float) -> int:
        """The one it is bound to, or the dial's; a higher one if only that makes the deadline."""
        if ticket.bound is not None:
            return ticket.bound
        lowest = self.dial.degree
        if ticket.calm_at is not None and len(self._waiting) == 1:
            lowest = min(lowest, ticket.calm_at)
        for degree in self.rules.degrees:
            late = now + self._seconds(ticket, degree) > ticket.deadline
            if degree >= lowest and not late:
                return degree
        return self._fastest_of(ticket)

    def _images_for(self, head: Ticket, degree: int, now: float) -> int:
        """Images that can run together so that the first deadline is made."""
        images = self._plan[head.name, degree].images
        left = head.deadline - now
        while images > 1 and self.costs.cautious(head.name, degree, images) > left:
            images //= 2
        return images

    def _together(self, head: Ticket, degree: int, most: int) -> Iterator[tuple[Ticket, int]]:
        found = 0
        for ticket in self._waiting:
            # The first one's may be higher than the dial's, to make its deadline.
            dial = degree if head.bound is None else self.dial.degree
            asks = dial if ticket.bound is None else ticket.bound
            if ticket.name != head.name or asks != degree:
                continue
            for place in range(ticket.begun, len(ticket.payloads)):
                if found == most:
                    return
                found += 1
                yield ticket, place

    def _worth_waiting(self, head: Ticket, room: int, now: float) -> float:
        """Seconds to wait for others, while they are likely to come and none is late for it."""
        if room <= 0 or self.draining:
            return 0.0
        wait = head.arrived + self.max_wait_s - now
        expected = self._rates[head.name, head.degree].at(now) * self.max_wait_s
        spare = head.deadline - now - self._seconds(head, self._fastest_of(head))
        return wait if expected >= 1 and 0 < wait < spare else 0.0

    def _work(self, tickets: Iterable[Ticket]) -> float:
        """Seconds for the images of these in full batches, each as fast as it may be."""
        return sum(
            self._plan[ticket.name, self._fastest_of(ticket)].each * ticket.left
            for ticket in tickets
        )

    def _seconds(self, ticket: Ticket, degree: int, others: int = 0, *, sure: bool = True) -> float:
        """Seconds for what is left of a request: in the mean, or nearly always (`sure`).

        Its batches may be filled up with `others`.
        """
        full = self._plan[ticket.name, degree]
        batches, rest = divmod(ticket.left, full.images)
        rest = min(rest + others, full.images)
        of = self.costs.cautious if sure else self.costs.seconds
        seconds = batches * of(ticket.name, degree, full.images)
        return seconds + (of(ticket.name, degree, rest) if rest else 0.0)

    def _fastest_of(self, ticket: Ticket) -> int:
        """The degree it is bound to, or the fastest that the dial may take."""
        if ticket.bound is not None:
            return ticket.bound
        return self._fastest[ticket.name]

    def _retry_s(self, tickets: Iterable[Ticket]) -> float:
        """Seconds after which these will have been answered."""
        return max(self._work(tickets), _SHORTEST_RETRY_S)


class _Rate:
    """Images a second, averaged with weights that fade."""

    def __init__(self, now: float) -> None:
        self._sum, self._now = 0.0, now

    def add(self, images: int, now: float) -> None:
        self._sum = self._faded(now) + images
        self._now = now

    def at(self, now: float) -> float:
        return self._faded(now) / _RATE_S

    def _faded(self, now: float) -> float:
        return self._sum * math.exp(-(now - self._now) / _RATE_S)
