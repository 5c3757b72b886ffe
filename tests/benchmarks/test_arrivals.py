"""Traces of load: pure, ascending, and of the rates that were asked for."""

import numpy as np
import pytest

from benchmarks import arrivals

DRAWN = {
    "poisson": lambda seed: arrivals.poisson(rate=50, seconds=40, seed=seed),
    "step": lambda seed: arrivals.step(low=20, high=60, seconds=40, at=10, until=30, seed=seed),
    "bursts": lambda seed: arrivals.bursts(
        low=10, high=200, seconds=40, lasting=0.5, apart=4, seed=seed
    ),
    "diurnal": lambda seed: arrivals.diurnal(low=5, high=95, seconds=40, period=20, seed=seed),
}


@pytest.mark.parametrize("trace", DRAWN.values(), ids=DRAWN)
def test_a_trace_ascends_within_its_length_and_follows_from_its_seed(trace):
    times = trace(3)
    assert np.all(np.diff(times) >= 0)
    assert times.min() >= 0
    assert times.max() < 40
    assert np.array_equal(times, trace(3))
    assert not np.array_equal(times, trace(4))


def test_steady_is_evenly_spaced():
    assert np.allclose(arrivals.steady(rate=4, seconds=1), [0, 0.25, 0.5, 0.75])


def test_gaps_of_poisson_arrivals_are_exponential():
    gaps = np.diff(arrivals.poisson(rate=100, seconds=200, seed=0))
    assert np.mean(gaps) == pytest.approx(0.01, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.01, rel=0.03)
    assert np.mean(gaps > 0.01) == pytest.approx(np.exp(-1), abs=0.01)


def test_a_step_has_its_rates_at_its_times():
    times = arrivals.step(low=100, high=300, seconds=90, at=10, until=70, seed=1)
    counts = arrivals.per_second(times, 90)
    assert counts.sum() == len(times)
    assert counts[10:70].mean() == pytest.approx(300, rel=0.03)
    assert np.r_[counts[:10], counts[70:]].mean() == pytest.approx(100, rel=0.06)


def test_bursts_last_and_lie_apart_as_asked():
    times = arrivals.bursts(low=0, high=1000, seconds=2000, lasting=1, apart=9, seed=2)
    begun = np.flatnonzero(np.diff(times) > 0.1)  # a gap that no burst has
    assert len(times) / 2000 == pytest.approx(100, rel=0.2)
    assert len(begun) == pytest.approx(200, rel=0.2)


def test_a_day_has_its_noon_in_the_middle():
    times = arrivals.diurnal(low=10, high=410, seconds=100, period=100, seed=0)
    counts = arrivals.per_second(times, 100)
    assert counts[45:55].mean() == pytest.approx(410, rel=0.05)
    assert counts[[*range(3), *range(97, 100)]].mean() < 25
    assert counts.mean() == pytest.approx(210, rel=0.03)


def test_recorded_times_start_at_nought_and_keep_their_gaps(tmp_path):
    path = tmp_path / "times.txt"
    path.write_text("# seconds since 1970\n1700000002.5\n\n1700000000\n1700000001\n")
    assert np.allclose(arrivals.read_trace(path), [0, 1, 2.5])
    assert np.allclose(arrivals.read_trace(path, speed=5), [0, 0.2, 0.5])


@pytest.mark.parametrize("text", ["1.0\nnoon\n", "1.0\nnan\n"])
def test_a_recorded_line_that_is_no_time_is_named(tmp_path, text):
    path = tmp_path / "times.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"times\.txt, line 2: 'n.+' is no number of seconds"):
        arrivals.read_trace(path)


def test_an_empty_recording_is_refused(tmp_path):
    (tmp_path / "times.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no times"):
        arrivals.read_trace(tmp_path / "times.txt")


def test_what_makes_no_trace_is_refused():
    with pytest.raises(ValueError, match="rate must be above 0, got -1"):
        arrivals.poisson(rate=-1, seconds=1, seed=0)
    with pytest.raises(ValueError, match="at <= until <= seconds, got 5, 4 and 10"):
        arrivals.step(low=1, high=2, seconds=10, at=5, until=4, seed=0)
