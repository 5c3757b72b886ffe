import pytest

from benchmarks.alternating import Runner, Spread, Turn, alternate, ratio


def test_runners_take_turns_and_each_starts_a_round():
    order = []
    runners = {name: Runner(lambda name=name: order.append(name)) for name in "abc"}
    alternate(runners, repeats=3, warm_up=0, seconds_per_round=0)
    assert "".join(order) == "abcbcacab"


def test_the_warm_up_does_not_count_and_each_turn_is_prepared():
    calls, prepared = [], []
    runner = Runner(lambda: calls.append(1), lambda: prepared.append(1))
    turns = alternate({"a": runner}, repeats=4, warm_up=2, seconds_per_round=0)
    assert (len(turns["a"]), len(calls), len(prepared)) == (4, 6, 6)


def test_short_passes_have_more_rounds():
    calls = []
    alternate({"a": Runner(lambda: calls.append(1))}, repeats=1, seconds_per_round=0.01)
    assert len(calls) > 10


def test_ratios_are_taken_within_a_round():
    # The machine is ten times as slow in the second round: a ratio of medians would be misled.
    base = [Turn(1.0, 0), Turn(10.0, 0), Turn(1.0, 0), Turn(10.0, 0)]
    own = [Turn(0.5, 0), Turn(5.0, 0), Turn(0.5, 0), Turn(5.0, 0)]
    assert ratio(base, own) == Spread(2.0, 2.0, 2.0)


def test_the_spread_holds_the_median():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, pytest.approx(1.2), pytest.approx(2.8))


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        alternate({}, repeats=0)
