"""A load that was sent to a server, and its outcome."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.arrivals import Times
from benchmarks.load import Exchange
from benchmarks.report import Row
from benchmarks.workload import Workload, predictions

REFUSED = (429, 503)


@dataclass(frozen=True, slots=True)
class Load:
    """A trace of arrivals, and the part of it that is evaluated."""

    times: Times
    """Times of the requests, in seconds."""
    seconds: float
    """Length of the trace in seconds."""
    start: float
    """Start of the evaluated part, in seconds."""
    end: float
    """End of the evaluated part. It is before `seconds` if the load falls at the end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request and one prediction for each image; none if it was not answered."""

    exchange: Exchange
    answer: Sequence[dict[str, Any]]

    @property
    def at(self) -> float:
        """Time of the answer, in seconds from the start of the load."""
        return self.exchange.planned + self.exchange.latency


@dataclass(frozen=True, slots=True)
class Played:
    """Outcome of a load."""

    load: Load
    outcomes: Sequence[Outcome]
    """The requests, in the order of their planned times."""
    each: int
    """Number of images in a request."""
    slo: float
    """Latency objective of the server, in seconds."""

    def row(self) -> Row:
        """Summarise the evaluated part."""
        counts = self._counts()
        answered = [some for some in counts if some.answer]
        refused = sum(some.exchange.status in REFUSED for some in counts)
        good = self._good(counts)
        return {
            "requests": len(counts),
            "answered": len(answered),
            "refused": refused,
            "errors": len(counts) - len(answered) - refused,
            "goodput": self.each * good / (self.load.end - self.load.start),
            "within": good / len(answered) if answered else None,
            "p50_ms": _percentile(answered, 50),
            "p99_ms": _percentile(answered, 99),
            "degree": _mean(answered, "degree"),
            "batch": _mean(answered, "batch"),
            "queue_ms": _mean(answered, "queue_ms"),
            "compute_ms": _mean(answered, "compute_ms"),
            "back_s": self.back(),
            "by_second": self.by_second(),
        }

    def score(self, workload: Workload, groups: Sequence[Sequence[int]]) -> float | None:
        """Accuracy, or what else runs are judged by, of the answers in the part that counts.

        All images weigh the same: of each, as many answers as of the one that has least, spread
        over the time. Else chance would decide which images a policy is judged by.

        Args:
            workload: Whose images were sent.
            groups: The images of each request, taken in turn.
        """
        found: dict[int, list[Outcome]] = {}
        for some in self._counts():
            if some.answer:
                found.setdefault(some.exchange.number % len(groups), []).append(some)
        least = min(map(len, found.values()), default=0)
        return workload.score(
            pair
            for group, outcomes in found.items()
            for turn in range(least)
            for pair in zip(
                groups[group], outcomes[turn * len(outcomes) // least].answer, strict=True
            )
        )

    def back(self) -> float | None:
        """Seconds from the fall of the load to the first answer after which all have degree 0.

        None if the load does not fall, or the last answer has another degree.
        """
        if self.load.end >= self.load.seconds:
            return None
        answered = [some for some in self.outcomes if some.answer]
        answered.sort(key=lambda some: some.at)
        reduced = [n for n, some in enumerate(answered) if _mean([some], "degree")]
        first = reduced[-1] + 1 if reduced else 0
        return max(0.0, answered[first].at - self.load.end) if first < len(answered) else None

    def by_second(self) -> list[Row]:
        """Summarise each second of the trace."""
        seconds: list[list[Outcome]] = [[] for _ in range(int(np.ceil(self.load.seconds)))]
        for some in self.outcomes:
            seconds[int(some.exchange.planned)].append(some)
        return [
            {
                "asked": self.each * len(row),
                "good": self.each * self._good(row),
                "degree": _mean(row, "degree"),
                "p99_ms": _percentile(row, 99),
            }
            for row in seconds
        ]

    def late(self) -> float:
        """99th percentile of the delay with which requests were sent, in milliseconds."""
        exchanges = [some.exchange for some in self.outcomes]
        late = [1000 * (one.sent - one.planned) for one in exchanges if one.sent is not None]
        return float(np.percentile(late, 99))

    def _counts(self) -> list[Outcome]:
        start, end = self.load.start, self.load.end
        return [some for some in self.outcomes if start <= some.exchange.planned < end]

    def _good(self, some: Sequence[Outcome]) -> int:
        """Number of requests that were answered in time."""
        return sum(one.exchange.within(self.slo) for one in some)


def played(load: Load, exchanges: Sequence[Exchange], each: int, slo: float) -> Played:
    """Parse the answers of a load."""
    outcomes = [Outcome(one, predictions(one) if one.status == 200 else ()) for one in exchanges]
    return Played(load, outcomes, each, slo)


def _percentile(some: Sequence[Outcome], share: float) -> float | None:
    """Percentile of the latency of answered requests, in milliseconds."""
    found = [1000 * one.exchange.latency for one in some if one.answer]
    return float(np.percentile(found, share)) if found else None


def _mean(some: Sequence[Outcome], key: str) -> float | None:
    """Mean of a value that the server returned for each image."""
    found = [prediction[key] for one in some for prediction in one.answer]
    return float(np.mean(found)) if found else None
