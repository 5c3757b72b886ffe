"""What Prometheus reads: latency by degree, the queue, the dial, refusals, accuracy to expect."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tokendial.serve.http.live import LastMinute
from tokendial.serve.http.schemas import Live
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.scheduler import Reason
from tokendial.serve.workers.served import Served

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)


class Metrics(Collector):
    """The numbers of one server; belongs to the thread of its event loop."""

    def __init__(self, engine: Engine, served: Served, slo_ms: float) -> None:
        self.last_minute = LastMinute(engine)
        self._engine, self._served, self._slo_ms = engine, served, slo_ms
        self._images = dict.fromkeys(get_args(Reason), 0)
        self._responses: Counter[int] = Counter()
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "tokendial_latency_seconds",
            "From the last byte of a request to its answer, for each image.",
            ["model", "degree"],
            # The objective is a bucket, so that the share within it can be read off.
            buckets=sorted({*_BUCKETS_S, slo_ms / 1000}),
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def answered(self, name: str, degree: int, seconds: float) -> None:
        """An image was answered, so long after it had arrived."""
        self._latency.labels(name, degree).observe(seconds)
        self.last_minute.answered(name, degree, seconds)

    def refused(self, reason: Reason, images: int) -> None:
        """Images were refused."""
        self._images[reason] += images

    def responded(self, status: int) -> None:
        """A request got a response."""
        self._responses[status] += 1

    def live(self) -> Live:
        """The last minute, for people."""
        return self.last_minute.told(self._slo_ms, dict(self._images))

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What is not counted as it happens, and what is counted here."""
        now = self._engine.status()
        for name, told, value in (
            ("degree", "Where the dial is.", now.degree),
            ("queued_images", "Images that wait.", now.queued),
            ("running_images", "Images in the model.", now.running),
            ("arrivals_per_second", "Images that were asked for lately.", now.arrivals_per_s),
            ("utilisation", "Share of the time needed at this degree.", now.utilisation),
            (
                "event_loop_lag_seconds",
                "Longest time in the last minute that the event loop was late.",
                self.last_minute.loop_lag_s,
            ),
        ):
            yield GaugeMetricFamily(f"tokendial_{name}", told, value)
        yield CounterMetricFamily("tokendial_answered_images", "By the model.", now.answered)
        refused = CounterMetricFamily("tokendial_refused_images", "By reason.", labels=["reason"])
        for reason, images in self._images.items():
            refused.add_metric([reason], images)
        yield refused
        responses = CounterMetricFamily("tokendial_responses", "By status.", labels=["status"])
        for status, count in self._responses.items():
            responses.add_metric([str(status)], count)
        yield responses
        accuracy = GaugeMetricFamily(
            "tokendial_accuracy_estimate",
            "Of the images of the last minute, by what their degrees reached in evaluation.",
            labels=["model"],
        )
        for name in self._served.facts.names:
            accuracy.add_metric(
                [name], self.last_minute.accuracy(name, self._served.facts.accuracy)
            )
        yield accuracy


class Joined(Collector):
    """The numbers of several servers, told apart by a label."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Take what `Metrics.text` gave for each."""
        self._texts = texts

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return prometheus_client.generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Each kind of number once, with the samples of all."""
        found: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for of in text_string_to_metric_families(text):
                joined = found.setdefault(of.name, Metric(of.name, of.documentation, of.type))
                joined.samples += [
                    sample._replace(labels=sample.labels | {"replica": replica})
                    for sample in of.samples
                ]
        return found.values()
