"""Metrics of several servers as one page."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tokendial.serve.ray.metrics import JoinedMetrics


def page(requests: int, *seconds: float) -> str:
    registry = CollectorRegistry()
    Counter("asked", "Requests.", registry=registry).inc(requests)
    latency = Histogram("latency", "Seconds.", ["degree"], buckets=(0.1, 1), registry=registry)
    for each in seconds:
        latency.labels("2").observe(each)
    return generate_latest(registry).decode()


def test_every_number_has_the_label_of_its_replica():
    text = JoinedMetrics({"a": page(3, 0.05, 0.5), "b": page(4)}).text().decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert found["asked"].type == "counter"
    assert found["latency"].type == "histogram"
    values = {
        (s.name, *sorted(s.labels.items())): s.value for f in found.values() for s in f.samples
    }
    assert values["asked_total", ("replica", "a")] == 3
    assert values["asked_total", ("replica", "b")] == 4
    assert values["latency_bucket", ("degree", "2"), ("le", "0.1"), ("replica", "a")] == 1
    assert values["latency_count", ("degree", "2"), ("replica", "a")] == 2
    assert text.count("# TYPE latency histogram") == 1
