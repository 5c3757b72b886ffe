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
class RequestOutcome:
    """A request and its predictions."""

    exchange: Exchange
    """The request, its times and its status."""
    answer: Sequence[dict[str, Any]]
    """One prediction for each image; empty if the request was not answered."""

    @property
    def at(self) -> float:
        """Time of the answer, in seconds from the start of the load."""
        return self.exchange.planned + self.exchange.latency


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """The outcome of a load."""

    load: Load
    """The trace, and its evaluated part."""
    outcomes: Sequence[RequestOutcome]
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
            "twice": _share_twice(answered),
            "batch": _mean(answered, "batch"),
            "queue_ms": _mean(answered, "queue_ms"),
            "compute_ms": _mean(answered, "compute_ms"),
            "back_s": self.back(),
            "by_second": self.by_second(),
        }

    def score(self, workload: Workload, groups: Sequence[Sequence[int]]) -> float | None:
        """The task's main metric, over the answers in the evaluated part.

        All images have the same weight: each group of images is represented by the same number of
        answers, that of the group with the fewest, spread evenly over time. Otherwise chance would
        decide which images a policy is evaluated on.

        Args:
            workload: The images that were sent, with their labels.
            groups: The images of each request; requests used the groups in turn.
        """
        found: dict[int, list[RequestOutcome]] = {}
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
        """Seconds from the end of the evaluated part until all further answers have degree 0.

        None if the trace ends with the evaluated part, or the last answer has another degree.
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
        seconds: list[list[RequestOutcome]] = [[] for _ in range(int(np.ceil(self.load.seconds)))]
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

    def _counts(self) -> list[RequestOutcome]:
        start, end = self.load.start, self.load.end
        return [some for some in self.outcomes if start <= some.exchange.planned < end]

    def _good(self, some: Sequence[RequestOutcome]) -> int:
        """Number of requests that were answered in time."""
        return sum(one.exchange.within(self.slo) for one in some)


def parse_outcome(load: Load, exchanges: Sequence[Exchange], each: int, slo: float) -> LoadOutcome:
    """Parse the answers of a load."""
    outcomes = [
        RequestOutcome(one, predictions(one) if one.status == 200 else ()) for one in exchanges
    ]
    return LoadOutcome(load, outcomes, each, slo)


def _percentile(some: Sequence[RequestOutcome], share: float) -> float | None:
    """Percentile of the latency of answered requests, in milliseconds."""
    found = [1000 * one.exchange.latency for one in some if one.answer]
    return float(np.percentile(found, share)) if found else None


def _share_twice(some: Sequence[RequestOutcome]) -> float | None:
    """Share of the images that a cascade gave a second answer."""
    found = [
        any(degree != prediction["degree"] for degree in prediction["unsure_at"])
        for one in some
        for prediction in one.answer
    ]
    return float(np.mean(found)) if found else None


def _mean(some: Sequence[RequestOutcome], key: str) -> float | None:
    """Mean of a value that the server returned for each image."""
    found = [prediction[key] for one in some for prediction in one.answer]
    return float(np.mean(found)) if found else None
