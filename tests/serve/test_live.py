"""The last minute of a server, second by second, without a clock."""

import math

import pytest

from tokendial.serve.http.metrics import LastMinute
from tokendial.serve.scheduling.controller import ControllerRules
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.scheduler import Scheduler


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def minute(clock):
    costs = CostModel({("pets", degree): {1: 0.001} for degree in (0, 1)})
    engine = Engine(lambda *_: [], Scheduler(costs, ControllerRules(0.1, (0, 1))), clock=clock)
    return LastMinute(engine, clock)


def test_past_seconds_are_relative_to_now(minute, clock):
    for second in range(70):
        clock.now += 1
        minute.count_answer("pets", 0, second / 1000)
        minute.end_second()
    clock.now += 0.5
    live = minute.summary(100.0, {"full": 2})
    assert [past.t for past in live.history] == [-59.5 + second for second in range(60)]
    assert [past.p99_ms for past in live.history] == pytest.approx(list(range(10, 70)))
    assert (live.slo_ms, live.refused, live.degree) == (100.0, {"full": 2}, 0)


def test_percentiles_are_those_of_the_latest_seconds(minute):
    assert minute.summary(100.0, {}).p99_ms is None
    minute.count_answer("pets", 0, 9.0)
    for _ in range(20):
        minute.end_second()
    for milliseconds in range(1, 201):
        minute.count_answer("pets", 0, milliseconds / 1000)
    live = minute.summary(100.0, {})
    assert (live.p50_ms, live.p99_ms) == pytest.approx((100, 198))


def test_accuracy_is_the_mean_over_the_images_of_a_model(minute):
    known = {("pets", 0): 0.9, ("pets", 1): 0.5, ("cars", 0): 0.1}
    assert math.isnan(
        minute.expected_accuracy("pets", lambda *of: known.get(of))
    )  # nothing was answered
    for degree, images in ((0, 3), (1, 1)):
        for _ in range(images):
            minute.count_answer("pets", degree, 0.01)
        minute.end_second()
    minute.count_answer("cars", 0, 0.01)
    assert minute.expected_accuracy("pets", lambda *of: known.get(of)) == pytest.approx(0.8)
    minute.count_answer("pets", 2, 0.01)  # a degree that was not evaluated
    assert math.isnan(minute.expected_accuracy("pets", lambda *of: known.get(of)))


def test_the_longest_delay_of_the_event_loop_is_kept(minute):
    for late_s in (0.01, 0.2, 0.03):
        minute.record_loop_lag(late_s)
    minute.end_second()
    minute.record_loop_lag(0.05)
    minute.end_second()
    history = minute.summary(100.0, {}).history
    assert [past.loop_lag_ms for past in history] == pytest.approx([200, 50])
    assert minute.loop_lag_s == 0.2
