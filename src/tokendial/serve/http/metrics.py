"""Metrics of the server: since its start for Prometheus, of the last minute for the web page."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokendial.serve.http.schemas import Live, Second
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.requests import RefusalReason
from tokendial.serve.scheduling.second_answers import CascadeStatus
from tokendial.serve.workers.supervisor import Supervisor

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
_HISTORY_S = 60
_PERCENTILE_WINDOW_S = 10
"""Seconds over which the present percentiles are taken."""
_LOOP_CHECK_S = 0.01
"""Seconds between two measurements of the event loop's delay."""
_MAX_UTILISATION = 1e6
"""Shown in place of infinity, which JSON does not have."""


class Metrics(Collector):
    """The metrics of one server. To be used in the thread of its event loop."""

    def __init__(self, engine: Engine, supervisor: Supervisor, slo_ms: float) -> None:
        self.last_minute = LastMinute(engine)
        self._engine, self._supervisor, self._slo_ms = engine, supervisor, slo_ms
        self._refused = dict.fromkeys(get_args(RefusalReason), 0)
        self._responses: Counter[int] = Counter()
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "tokendial_latency_seconds",
            "Seconds from the last byte of a request to its answer, for each image.",
            ["model", "degree"],
            # The objective is a bucket, so that the fraction within it can be read off.
            buckets=sorted({*_BUCKETS_S, slo_ms / 1000}),
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def count_answer(self, name: str, degree: int, seconds: float) -> None:
        """Count an image that was answered `seconds` after its arrival."""
        self._latency.labels(name, degree).observe(seconds)
        self.last_minute.count_answer(name, degree, seconds)

    def count_refusal(self, reason: RefusalReason, images: int) -> None:
        """Count refused images."""
        self._refused[reason] += images

    def count_response(self, status: int) -> None:
        """Count a response by its HTTP status."""
        self._responses[status] += 1

    def live(self) -> Live:
        """The present state and the last minute."""
        return self.last_minute.summary(self._slo_ms, dict(self._refused))

    def text(self) -> bytes:
        """All metrics in the format of Prometheus."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that prometheus_client does not count itself."""
        now = self._engine.status()
        for name, description, value in (
            ("degree", "Degree of the dial.", now.degree),
            ("queued_images", "Number of waiting images.", now.queued),
            ("running_images", "Number of images in the running batch.", now.running),
            ("arrivals_per_second", "Images per second that arrived lately.", now.arrivals_per_s),
            (
                "utilisation",
                "Fraction of the time that the arrivals need at this degree.",
                now.utilisation,
            ),
            (
                "event_loop_lag_seconds",
                "Longest delay of the event loop in the last minute.",
                self.last_minute.loop_lag_s,
            ),
        ):
            yield GaugeMetricFamily(f"tokendial_{name}", description, value)
        yield CounterMetricFamily("tokendial_answered_images", "Answered images.", now.answered)
        if now.cascade:
            yield from _cascade_metrics(now.cascade)
        refused = CounterMetricFamily(
            "tokendial_refused_images", "Refused images by reason.", labels=["reason"]
        )
        for reason, images in self._refused.items():
            refused.add_metric([reason], images)
        yield refused
        responses = CounterMetricFamily(
            "tokendial_responses", "Responses by HTTP status.", labels=["status"]
        )
        for status, count in self._responses.items():
            responses.add_metric([str(status)], count)
        yield responses
        accuracy = GaugeMetricFamily(
            "tokendial_accuracy_estimate",
            "Mean accuracy, as measured by tokendial eval, of the last minute's degrees.",
            labels=["model"],
        )
        catalog = self._supervisor.catalog
        for name in catalog.names:
            estimate = self.last_minute.expected_accuracy(name, catalog.accuracy)
            accuracy.add_metric([name], estimate)
        yield accuracy


def _cascade_metrics(now: CascadeStatus) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "tokendial_second_answers", "Images that were run again at a better degree.", now.sent_on
    )
    for name, description, value in (
        (
            "unsure_share",
            "Share of unsure ones among the last first answers.",
            math.nan if now.unsure is None else now.unsure,
        ),
        ("sent_on_share", "Share of the unsure images that there is time to run again.", now.share),
        (
            "cascade_drifted",
            "1 if the share of unsure images lies outside of its calibrated interval.",
            now.drifted,
        ),
    ):
        yield GaugeMetricFamily(f"tokendial_{name}", description, value)


@dataclass
class _SecondCounts:
    """What happened within one second."""

    latencies_s: list[float] = field(default_factory=list)
    """Latency of each answered image, in seconds."""
    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of answered images by model and degree."""
    loop_lag_s: float = 0.0
    """Longest delay of the event loop, in seconds."""


class LastMinute:
    """The last minute, second by second. To be used in one thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._counts = deque([_SecondCounts()], maxlen=_HISTORY_S)
        self._seconds: deque[Second] = deque(maxlen=_HISTORY_S)
        """Past seconds; their `t` is the clock's time at their end."""

    def count_answer(self, name: str, degree: int, seconds: float) -> None:
        """Count an image that was answered `seconds` after its arrival."""
        self._counts[-1].latencies_s.append(seconds)
        self._counts[-1].images[name, degree] += 1

    def record_loop_lag(self, delay_s: float) -> None:
        """Record that the event loop was late by `delay_s`."""
        self._counts[-1].loop_lag_s = max(self._counts[-1].loop_lag_s, delay_s)

    @property
    def loop_lag_s(self) -> float:
        """Longest delay of the event loop in the last minute, in seconds."""
        return max(second.loop_lag_s for second in self._counts)

    def end_second(self) -> None:
        """Begin the next second."""
        status = self._engine.status()
        self._seconds.append(
            Second(
                t=self._clock(),
                degree=status.degree,
                load=status.arrivals_per_s,
                p99_ms=_percentile_ms(self._counts[-1].latencies_s, 0.99),
                queued=status.queued,
                loop_lag_ms=1000 * self._counts[-1].loop_lag_s,
            )
        )
        self._counts.append(_SecondCounts())

    def summary(self, slo_ms: float, refused: dict[str, int]) -> Live:
        """The present state and the last minute, as `/v1/live` answers."""
        now, status = self._clock(), self._engine.status()
        latest = list(self._counts)[-_PERCENTILE_WINDOW_S:]
        latencies_s = [latency_s for second in latest for latency_s in second.latencies_s]
        return Live(
            now=time.time(),
            degree=status.degree,
            queued=status.queued,
            arrivals_per_s=status.arrivals_per_s,
            # It is infinite where the objective is shorter than one image takes.
            utilisation=min(status.utilisation, _MAX_UTILISATION),
            answered=status.answered,
            refused=refused,
            p50_ms=_percentile_ms(latencies_s, 0.5),
            p99_ms=_percentile_ms(latencies_s, 0.99),
            slo_ms=slo_ms,
            history=[past.model_copy(update={"t": past.t - now}) for past in self._seconds],
        )

    def expected_accuracy(self, name: str, accuracy: Callable[[str, int], float | None]) -> float:
        """Mean accuracy of a model's answers in the last minute, by the degrees they ran at.

        Args:
            name: Name of the model.
            accuracy: Returns the measured accuracy of a model at a degree, None if unknown.

        Returns:
            NaN if no image was answered, or an accuracy is unknown.
        """
        images: Counter[int] = Counter()
        for second in self._counts:
            for (model, degree), count in second.images.items():
                if model == name:
                    images[degree] += count
        known = {degree: accuracy(name, degree) for degree in images}
        if not images or None in known.values():
            return math.nan
        right = sum(count * (known[degree] or 0.0) for degree, count in images.items())
        return right / images.total()

    async def end_every_second(self) -> None:
        """Call `end_second` once a second, until cancelled."""
        while True:
            await asyncio.sleep(1)
            self.end_second()

    async def measure_loop_lag(self) -> None:
        """Measure by how much the event loop is late, until cancelled."""
        while True:
            due = time.monotonic() + _LOOP_CHECK_S
            await asyncio.sleep(_LOOP_CHECK_S)
            self.record_loop_lag(time.monotonic() - due)


def _percentile_ms(seconds: list[float], share: float) -> float | None:
    """Percentile in milliseconds (`share` of 0.99 is the 99th); None without values."""
    if not seconds:
        return None
    return 1000 * sorted(seconds)[math.ceil(share * len(seconds)) - 1]
