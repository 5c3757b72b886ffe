"""Second answers of a cascade: the scheduler on traces, without a clock."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import DEGREES, SimulatedRequest, capacity, scheduler, simulate, true_seconds

from benchmarks import arrivals
from tokendial.cascade import CascadeCalibration, CascadeStages
from tokendial.serve.scheduling.second_answers import SecondAnswers

SLO = 0.2
BASE = capacity(0)
UNSURE = 0.2


def stages(degrees=(12, 0), unsure=(UNSURE,)) -> CascadeStages:
    """Images are as sure as a uniform number in (0, 1), so a threshold is a share."""
    calibration = CascadeCalibration(
        thresholds=unsure,
        harm="changed",
        allowed=0.05,
        confidence=0.95,
        images=800,
        harmed=10,
        bound=0.02,
        sent_on=unsure,
        sent_on_range=tuple((share - 0.03, share + 0.03) for share in unsure),
    )
    return CascadeStages(degrees, calibration=calibration)


def cascading(found: CascadeStages, slo_s: float = SLO):
    """A scheduler whose dial has the ends of the cascade, and what is above."""
    degrees = (0, *(degree for degree in DEGREES if degree >= found.degrees[0]))
    return scheduler(slo_s, degrees, second_answers=SecondAnswers(lambda: found))


def asked(times, seed: int = 0, shift: float = 0.0, **kwargs) -> list[SimulatedRequest]:
    sure = np.random.default_rng(seed).random(len(times)) - shift
    return [
        SimulatedRequest(float(time), sure=float(each), **kwargs)
        for time, each in zip(times, sure, strict=True)
    ]


def again(played) -> list[SimulatedRequest]:
    return [each for each in played.answered if len(each.degrees) > 1]


def test_a_load_that_degree_0_can_answer_needs_no_second_answers():
    times = arrivals.poisson(rate=0.5 * BASE, seconds=20, seed=0)
    played = simulate(cascading(stages()), asked(times))
    assert len(played.answered) == len(times)
    assert len(again(played)) < 0.02 * len(times)


def test_unsure_images_are_answered_again_where_the_load_leaves_time():
    # Degree 12 needs 0.64 of degree 0: at 1.05 times its capacity a fifth more is 0.88 of the time.
    times = arrivals.poisson(rate=1.05 * BASE, seconds=20, seed=0)
    played = simulate(cascading(stages()), asked(times))
    assert len(played.answered) == len(times)
    assert played.within(SLO) == 1
    first = [each for each in played.answered if each.degrees[0] == 12]
    assert len(first) > 0.9 * len(times)
    assert all(each.degrees == [12, 0] and each.sure < UNSURE for each in again(played))
    unsure = [each for each in first if each.sure < UNSURE]
    assert len(again(played)) > 0.8 * len(unsure)


def test_with_less_time_the_least_sure_ones_come_first():
    times = arrivals.poisson(rate=1.05 * BASE, seconds=20, seed=0)
    queue = cascading(stages(unsure=(0.5,)))
    played = simulate(queue, asked(times))
    assert queue.second_answers.status.share < 0.9
    unsure = [each.sure for each in played.answered if each.sure < 0.5]
    sent = [each.sure for each in again(played)]
    assert 0.1 * len(unsure) < len(sent) < 0.9 * len(unsure)
    assert np.mean(sent) < 0.8 * np.mean(unsure)


@settings(max_examples=10, deadline=None)
@given(load=st.floats(0.2, 4.0), slo=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_second_answers_take_nothing_from_requests(load, slo, seed):
    times = arrivals.poisson(rate=load * BASE, seconds=4, seed=seed)
    plain = simulate(scheduler(slo, (0, *DEGREES[6:])), asked(times))
    played = simulate(cascading(stages(), slo), asked(times))
    assert all(each.done() for each in played.asked)
    assert played.within(slo) == 1
    assert len(played.answered) >= 0.97 * len(plain.answered) - 2


def test_in_overload_as_much_is_answered_as_without_a_cascade():
    times = arrivals.poisson(rate=3 * BASE, seconds=10, seed=0)
    plain, played = (simulate(each, asked(times)) for each in (scheduler(), cascading(stages())))
    assert len(played.answered) > 0.99 * len(plain.answered)
    assert played.within(SLO) == 1


def test_three_stages_lead_from_one_to_the_next():
    times = arrivals.poisson(rate=1.05 * BASE, seconds=20, seed=0)
    found = stages((12, 6, 0), (UNSURE, 0.1))
    played = simulate(cascading(found), asked(times))
    ways = {tuple(each.degrees) for each in played.answered if each.degrees[0] == 12}
    assert ways == {(12,), (12, 6), (12, 6, 0)}
    assert all(each.sure < 0.1 for each in played.answered if each.degrees == [12, 6, 0])


def test_requests_for_a_degree_get_that_degree_alone():
    times = arrivals.poisson(rate=0.5 * BASE, seconds=5, seed=0)
    played = simulate(cascading(stages()), asked(times, degree=12))
    assert {tuple(each.degrees) for each in played.answered} == {(12,)}


def test_an_image_keeps_its_answer_if_the_machine_becomes_slow():
    times = arrivals.poisson(rate=1.05 * BASE, seconds=20, seed=0)

    def takes(batch, now):
        slow = 3 if 5 < now < 15 else 1
        return slow * true_seconds(batch.name, batch.degree, len(batch.parts))

    played = simulate(cascading(stages()), asked(times), takes=takes)
    assert all(each.done() for each in played.asked)
    unsure = [each for each in played.answered if 6 < each.at < 15 and each.sure < UNSURE]
    assert any(len(each.degrees) == 1 for each in unsure)
    assert played.within(SLO) > 0.98


@pytest.mark.parametrize("others", [False, True])
def test_images_of_another_kind_are_noticed(others, caplog):
    queue = cascading(stages())
    times = arrivals.poisson(rate=1.05 * BASE, seconds=40, seed=0)
    requests = asked(times)
    for each in requests:
        each.sure -= 0.3 * (others and 10 < each.at < 20)
    simulate(queue, requests)
    lines = [record.getMessage() for record in caplog.records]
    status = queue.second_answers.status
    assert status.unsure == pytest.approx(UNSURE, abs=0.05)
    assert not status.drifted
    assert len(lines) == 2 * others
    if others:
        assert "% are unsure at degree 12; the calibration expects 17.0 to 23.0 %" in lines[0]
        assert "says nothing about such images" in lines[0]
        assert "like those of the calibration again" in lines[1]
