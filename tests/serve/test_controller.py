"""The controller and the scheduler, on traces, without a clock."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import (
    DEGREES,
    NAME,
    SimulatedRequest,
    capacity,
    costs,
    scheduler,
    simulate,
    true_seconds,
)

from benchmarks import arrivals
from tokendial.serve.scheduling.controller import (
    ControllerRules,
    DialState,
    Observation,
    next_dial,
    plan_batches,
    pressure,
)

SLO = 0.2
RULES = ControllerRules(SLO, DEGREES)
PLAN = plan_batches(costs(), RULES)
BASE = capacity(0)


def asked(times, **kwargs) -> list[SimulatedRequest]:
    return [SimulatedRequest(float(time), **kwargs) for time in times]


def seen(load: float, now: float = 0.0, waiting=()) -> Observation:
    """Arrivals of so many times what degree 0 can do."""
    return Observation(now, {(NAME, None): load * BASE}, waiting)


def test_the_degree_rises_at_once_as_far_as_needed():
    for load in (1.1, 1.3, 1.6, 1.8):
        degree = next_dial(DialState(0), seen(load), PLAN, RULES).degree
        assert pressure(degree, seen(load), PLAN, RULES) <= RULES.raise_above
        lower = DEGREES[DEGREES.index(degree) - 1]
        assert pressure(lower, seen(load), PLAN, RULES) > RULES.raise_above


def test_waiting_images_raise_the_degree_as_arrivals_do():
    rest = seen(0.5)
    assert next_dial(DialState(0), rest, PLAN, RULES).degree == 0
    soon = seen(0.5, waiting=[((NAME, None), int(0.98 * SLO * BASE), SLO)])
    assert next_dial(DialState(0), soon, PLAN, RULES).degree > 0
    # The same images with a minute left are no reason to lose accuracy.
    later = seen(0.5, waiting=[((NAME, None), int(0.98 * SLO * BASE), 60.0)])
    assert next_dial(DialState(0), later, PLAN, RULES).degree == 0


def test_the_degree_falls_to_the_highest_one_that_was_needed_lately():
    dial = next_dial(DialState(16), seen(1.9, now=10.0), PLAN, RULES)
    assert dial.degree == 16
    dial = next_dial(dial, seen(1.0, now=11.0), PLAN, RULES)
    (_, needed) = dial.sufficient[-1]
    assert 0 < needed < 16
    dial = next_dial(dial, seen(0.2, now=11.9), PLAN, RULES)
    assert dial.degree == 16  # it was needed not two seconds ago
    dial = next_dial(dial, seen(0.2, now=12.1), PLAN, RULES)
    assert dial.degree == needed
    assert next_dial(dial, seen(0.2, now=13.1), PLAN, RULES).degree == 0


def test_a_sufficient_degree_is_kept_if_a_lower_one_is_barely_sufficient():
    dial, degrees = DialState(0), set()
    for tenth in range(100):
        dial = next_dial(dial, seen(1.3 + 0.1 * (-1) ** tenth, now=tenth / 10), PLAN, RULES)
        degrees.add(dial.degree)
    assert len(degrees) <= 2  # up to the first one that does, and once higher


@given(load=st.floats(0, 10), degree=st.sampled_from(DEGREES), top=st.sampled_from(DEGREES))
def test_the_highest_allowed_degree_is_never_exceeded(load, degree, top):
    rules = ControllerRules(SLO, tuple(each for each in DEGREES if each <= top))
    dial = next_dial(DialState(min(degree, top)), seen(load), PLAN, rules)
    assert dial.degree in rules.degrees


def test_a_degree_that_is_too_slow_for_the_objective_is_not_used():
    slo = 1.2 * true_seconds(NAME, 10, 1)  # degrees below miss it with the first image
    rules = ControllerRules(slo, DEGREES)
    plan = plan_batches(costs(), rules)
    assert pressure(0, seen(0.01), plan, rules) == math.inf
    assert next_dial(DialState(0), seen(0.01), plan, rules).degree > 0


@pytest.mark.parametrize("images", [4, 20, 60])
def test_a_request_to_an_idle_server_is_answered_at_degree_0(images):
    """However many images it has, if there is time."""
    played = simulate(scheduler(SLO), [SimulatedRequest(1.0, images, within_s=5.0)])
    assert played.asked[0].degrees == [0] * images
    assert len(played.batches) > 1 or images == 4


@pytest.mark.parametrize("images", [1, 4])
def test_a_too_short_objective_counts_only_for_requests_without_a_deadline(images):
    patient = [SimulatedRequest(float(at), images, within_s=5.0) for at in range(0, 20, 2)]
    short = 0.9 * true_seconds(NAME, 0, 1)
    played = simulate(scheduler(short), patient)
    assert {degree for each in played.asked for degree in each.degrees} == {0}
    hurried = simulate(scheduler(short), [SimulatedRequest(float(at)) for at in range(20)])
    assert not any(each.refused for each in hurried.asked)
    assert all(each.degrees[0] > 0 for each in hurried.asked)
    assert simulate(scheduler(short), [SimulatedRequest(0.0)], seconds=30).degree_at(30) == 0


def test_all_images_of_a_request_have_one_degree():
    many = SimulatedRequest(0.0, images=40, within_s=5.0)
    burst = asked(arrivals.steady(rate=1.7 * BASE, seconds=2))
    played = simulate(scheduler(SLO), [many, *burst])
    assert len(set(many.degrees)) == 1
    assert len({degree for _, degree in played.dial}) > 1


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_light_load_is_served_at_degree_0(load):
    times = arrivals.poisson(rate=load * BASE, seconds=30, seed=0)
    played = simulate(scheduler(SLO), asked(times))
    assert not any(each.refused for each in played.asked)
    assert played.within(SLO) == 1
    zero = np.mean([degree == 0 for each in played.asked for degree in each.degrees])
    assert zero > 0.98


@pytest.mark.parametrize("load", [1.2, 1.5, 1.75])
def test_load_that_a_higher_degree_can_answer_is_answered(load):
    times = arrivals.poisson(rate=load * BASE, seconds=30, seed=1)
    played = simulate(scheduler(SLO), asked(times))
    assert played.within(SLO) == 1
    assert len(played.answered) > 0.98 * len(times)
    assert played.turns() < 30  # at most one a second


def test_a_step_to_three_times_the_capacity_and_back():
    times = arrivals.step(low=0.5 * BASE, high=3 * BASE, seconds=90, at=10, until=70, seed=2)
    played = simulate(scheduler(SLO), asked(times), seconds=90)
    fixed = simulate(scheduler(SLO, (0,)), asked(times), seconds=90)
    assert played.within(SLO) >= 0.99
    assert played.degree_at(9.9) == 0
    assert played.degree_at(40) == DEGREES[-1]
    assert played.degree_at(75) == 0
    during = [sum(10 <= each.at < 70 for each in some.answered) for some in (played, fixed)]
    assert during[0] > 1.8 * during[1]


@pytest.mark.parametrize(
    "times",
    [
        arrivals.steady(rate=0.9 * BASE, seconds=30),
        arrivals.bursts(low=0.3 * BASE, high=4 * BASE, seconds=60, lasting=1.0, apart=5.0, seed=3),
        arrivals.diurnal(low=0.1 * BASE, high=2.5 * BASE, seconds=60, period=30, seed=4),
    ],
    ids=["steady", "bursts", "diurnal"],
)
def test_answers_are_in_time_and_the_dial_returns(times):
    played = simulate(scheduler(SLO), asked(times), seconds=times[-1] + 10)
    assert played.within(SLO) >= 0.99
    assert played.dial[-1][1] == 0


def test_a_recorded_trace_is_answered(tmp_path):
    path = tmp_path / "arrivals.txt"
    path.write_text("\n".join(str(1700000000 + number / 50) for number in range(500)))
    played = simulate(scheduler(SLO), asked(arrivals.read_trace(path)))
    assert len(played.answered) == 500


def test_the_degree_rises_when_the_machine_becomes_slower():
    """Something else takes two thirds of it: what was promised is kept, at a higher degree."""

    def takes(batch, now):
        slow = 1.0 if now < 5 else 1.6
        return slow * true_seconds(batch.name, batch.degree, len(batch.parts))

    times = arrivals.poisson(rate=0.7 * BASE, seconds=30, seed=5)
    played = simulate(scheduler(SLO), asked(times), takes=takes)
    assert played.within(SLO) >= 0.99
    assert played.degree_at(4.9) == 0
    assert min(degree for at, degree in played.dial if 15 < at < 30) > 0


def test_deadlines_are_met_though_batch_times_vary():
    draw = np.random.default_rng(0)

    def takes(batch, now):
        return true_seconds(batch.name, batch.degree, len(batch.parts)) * draw.lognormal(0, 0.2)

    times = arrivals.poisson(rate=3 * BASE, seconds=30, seed=6)
    played = simulate(scheduler(SLO), asked(times), takes=takes)
    assert played.within(SLO) >= 0.99
    assert len(played.answered) > 0.9 * 30 * capacity(DEGREES[-1])


@given(
    st.lists(
        st.builds(
            SimulatedRequest,
            at=st.floats(0, 2),
            images=st.integers(1, 12),
            degree=st.sampled_from([None, 0, 8, 16]),
            within_s=st.sampled_from([None, 0.05, 0.5, 5.0]),
            leaves_at=st.sampled_from([math.inf, 1.0]),
        ),
        max_size=60,
    )
)
def test_every_request_ends_once_in_time_and_at_its_degree(requests):
    requests = [SimulatedRequest(**vars(each) | {"degrees": []}) for each in requests]
    played = simulate(scheduler(SLO, max_queue=100), requests)
    for each in played.asked:
        ends = [each.answered_at is not None, each.refused is not None, each.cancelled()]
        assert any(ends)
        assert not all(ends[:2])
        if each.answered_at is not None:
            assert len(each.degrees) == each.images
            assert len(set(each.degrees)) == 1
            assert each.seconds <= (each.within_s or SLO) + 1e-9
            if each.degree is not None:
                assert set(each.degrees) == {each.degree}
    assert all(len({(t.name, t.degree) for t, _ in b.parts}) <= 2 for b in played.batches)


def test_a_machine_that_was_slow_once_is_used_again():
    """For two seconds everything takes ten times as long, and nearly all is refused."""

    def takes(batch, now):
        slow = 10.0 if 5 < now < 7 else 1.0
        return slow * true_seconds(batch.name, batch.degree, len(batch.parts))

    times = arrivals.poisson(rate=0.5 * BASE, seconds=60, seed=7)
    played = simulate(scheduler(SLO), asked(times), takes=takes)
    late = [each for each in played.asked if each.at > 30]
    assert not any(each.refused for each in late)
    assert {degree for each in late for degree in each.degrees} == {0}


def test_corrections_decay_while_nothing_runs():
    known = costs()
    for _ in range(100):
        known.observe(NAME, 0, 1, 5 * true_seconds(NAME, 0, 1))
    assert known.seconds(NAME, 0, 1) > 3 * true_seconds(NAME, 0, 1)
    known.decay(300)
    assert known.seconds(NAME, 0, 1) == pytest.approx(true_seconds(NAME, 0, 1), rel=0.01)
