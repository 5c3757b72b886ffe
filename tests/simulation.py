"""A simulated server: the real scheduler and controller, with batches that compute nothing.

The clock is simulated too, so simulations are exact and fast.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tokendial.serve.scheduling.controller import ControllerRules
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.scheduling.requests import Batch, QueuedRequest, RequestRefusedError
from tokendial.serve.scheduling.scheduler import Scheduler

TICK_S = 0.1
DEGREES = tuple(range(0, 17, 2))
NAME = "pets"


def true_seconds(name: str, degree: int, images: int) -> float:
    """Seconds of a batch: 2 ms, plus 8 ms per image at degree 0 and 4 ms per image at degree 16."""
    return 0.002 + 0.008 * images * (1 - degree / 32)


def costs(names: Iterable[str] = (NAME,), degrees: Iterable[int] = DEGREES) -> CostModel:
    return CostModel(
        {
            (name, degree): {n: true_seconds(name, degree, n) for n in (1, 2, 4, 8, 16, 32)}
            for name in names
            for degree in degrees
        }
    )


def capacity(degree: int, images: int = 8) -> float:
    """Images per second in batches of `images`."""
    return images / true_seconds(NAME, degree, images)


def scheduler(slo_s: float = 0.2, degrees: tuple[int, ...] = DEGREES, **kwargs) -> Scheduler:
    return Scheduler(costs(), ControllerRules(slo_s, degrees), **kwargs)


@dataclass
class SimulatedRequest:
    """A request of the simulation, and its outcome."""

    at: float
    images: int = 1
    degree: int | None = None
    within_s: float | None = None
    name: str = NAME
    leaves_at: float = math.inf
    answered_at: float | None = None
    refused: str | None = None
    degrees: list[int] = field(default_factory=list)
    sure: float = 1.0
    left: int = 0
    now: Callable[[], float] = field(default=lambda: 0.0)

    def cancelled(self) -> bool:
        return self.now() >= self.leaves_at

    def done(self) -> bool:
        return self.cancelled() or self.refused is not None or self.answered_at is not None

    def refuse(self, refused: RequestRefusedError) -> None:
        self.refused = refused.reason

    def keep_answer(self, index: int) -> None:
        self.answer()

    def answer(self) -> None:
        """Count an image that was answered."""
        self.left -= 1
        if not self.left and self.refused is None:
            self.answered_at = self.now()

    @property
    def seconds(self) -> float:
        assert self.answered_at is not None
        return self.answered_at - self.at


@dataclass
class Simulation:
    """Result of a simulation."""

    asked: list[SimulatedRequest]
    dial: list[tuple[float, int]]
    batches: list[Batch]

    @property
    def answered(self) -> list[SimulatedRequest]:
        return [each for each in self.asked if each.answered_at is not None]

    def within(self, slo_s: float) -> float:
        """Fraction of the answered requests that were answered within `slo_s` seconds."""
        return float(np.mean([each.seconds <= slo_s for each in self.answered]))

    def turns(self) -> int:
        degrees = [degree for _, degree in self.dial]
        return sum(a != b for a, b in pairwise(degrees))

    def degree_at(self, time: float) -> int:
        return [degree for at, degree in self.dial if at <= time][-1]


def simulate(
    scheduler: Scheduler,
    asked: Iterable[SimulatedRequest],
    *,
    seconds: float = math.inf,
    takes: Callable[[Batch, float], float] = lambda batch, now: true_seconds(
        batch.name, batch.degree, len(batch.parts)
    ),
) -> Simulation:
    """Simulate until all requests are answered and the time has reached `seconds`."""
    everything = sorted(asked, key=lambda each: each.at)
    coming = [(each.at, number, each) for number, each in enumerate(everything)]
    heapq.heapify(coming)
    now, dial, batches = 0.0, [(0.0, scheduler.dial.degree)], []

    def admit_until(time: float) -> None:
        while coming and coming[0][0] <= time:
            at, _, each = heapq.heappop(coming)
            each.now = lambda: now
            within = scheduler.rules.slo_s if each.within_s is None else each.within_s
            request = QueuedRequest(
                each.name, range(each.images), each.degree, at, at + within, owner=each
            )
            each.left = each.images
            try:
                scheduler.admit(request, at)
            except RequestRefusedError as refused:
                each.refused = refused.reason

    while True:
        admit_until(now)
        found = scheduler.next(now)
        dial.append((now, scheduler.dial.degree))
        if isinstance(found, Batch):
            took = takes(found, now)
            admit_until(now + took)
            now += took
            scheduler.finish(found, took, now)
            batches.append(found)
            owners = [request.owner for request, _ in found.parts]
            verdicts = ["sure"] * len(owners)
            if scheduler.second_answers:
                sure = [each.sure for each in owners]
                verdicts = scheduler.second_answers.judge(found, sure, now)
            for each, verdict in zip(owners, verdicts, strict=True):
                each.degrees.append(found.degree)
                if verdict != "sent on":
                    each.answer()
            continue
        if not coming and not scheduler.queued and (now >= seconds or seconds == math.inf):
            return Simulation(everything, dial, batches)
        now = min(now + min(found, TICK_S), coming[0][0] if coming else math.inf)
