"""The metrics of several replicas, joined for Prometheus."""

from collections.abc import Iterable, Mapping

import prometheus_client
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class JoinedMetrics(Collector):
    """Metrics of several replicas, with the label `replica`."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Join the texts of `Metrics.text`, by the names of the replicas."""
        self._texts = texts

    def text(self) -> bytes:
        """All metrics in the format of Prometheus."""
        return prometheus_client.generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Return each metric once, with the samples of all replicas."""
        metrics: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                new = Metric(family.name, family.documentation, family.type)
                metrics.setdefault(family.name, new).samples += [
                    sample._replace(labels=sample.labels | {"replica": replica})
                    for sample in family.samples
                ]
        return metrics.values()
