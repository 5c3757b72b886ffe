"""One clock: what slows the machine down must not change ratios.

The clock is played, so that disturbances come when the test says. What this cannot catch is a
device that has not finished when the clock is read; on a processor there is none.
"""

import itertools

import pytest
import torch

from tokendial.measure import timing

CPU = torch.device("cpu")


@pytest.fixture
def played(monkeypatch):
    """A clock that each run advances by its own time, multiplied by the present slow-down."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def measure(own_times, slowdown, **settings):
        runs = itertools.count()

        def run(own_time):
            now[0] += own_time * slowdown(next(runs))

        return timing.time_in_rounds(own_times, float, run, device=CPU, **settings)

    return measure


def test_times_are_those_of_an_idle_machine(played):
    timings = played([0.1, 0.05, 0.02], lambda run: 1.0)
    assert [t.seconds for t in timings] == pytest.approx([0.1, 0.05, 0.02])
    assert [t.spread for t in timings] == pytest.approx([0.0, 0.0, 0.0])
    assert not any(t.disturbed for t in timings)


@pytest.mark.parametrize("busy", [0.1, 0.4, 0.6, 1.0])
def test_another_program_does_not_change_ratios(played, busy):
    # The slow-down starts in the middle of a round and lasts for a share `busy` of all runs.
    first, last = played([0.1, 0.05], lambda run: 3.0 if 7 <= run < 7 + 40 * busy else 1.0)
    assert first.seconds / last.seconds == pytest.approx(2.0)


def test_times_that_another_program_stretched_are_marked(played):
    timings = played([0.1, 0.05], lambda run: 3.0 if run > 12 else 1.0, seconds=1.0)
    assert all(t.disturbed for t in timings)


def test_first_runs_do_not_count(played):
    first, last = played([0.1, 0.05], lambda run: 100.0 if run < 2 else 1.0)
    assert (first.seconds, last.seconds) == pytest.approx((0.1, 0.05))
    assert first.spread == pytest.approx(0.0)


def test_there_are_as_many_rounds_as_time_and_limits_allow(played):
    for own, counted in ((10.0, 3), (0.2, 4), (0.001, 6)):
        runs = []
        played(
            [own, own],
            lambda run, runs=runs: runs.append(run) or 1.0,
            seconds=1.0,
            least_rounds=3,
            most_rounds=6,
        )
        assert len(runs) == 2 * (1 + counted)


def test_each_setting_begins_a_round_in_turn():
    order = []
    timing.time_in_rounds(
        "abc", order.append, lambda _: None, device=CPU, seconds=0.0, least_rounds=3, warm_up=0
    )
    assert "".join(order) == "abcbcacab"


def test_the_times_of_each_counted_round_are_there(played):
    (only,) = played([0.1], lambda run: 1.0 + run, seconds=0.0, least_rounds=3)
    assert only.times == pytest.approx([0.2, 0.3, 0.4])
    assert (only.low, only.high) == pytest.approx((0.22, 0.38))
