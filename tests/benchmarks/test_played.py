"""A load that was played, counted by hand."""

import json

import numpy as np
import pytest

from benchmarks.load import Exchange
from benchmarks.played import Load, parse_outcome


def exchange(number, planned, ms=None, *degrees, status=200):
    """A request that was answered after some milliseconds at some degrees, or refused."""
    rows = [
        {"degree": n, "batch": 2, "queue_ms": 1.0 + n, "compute_ms": 9.0, "unsure_at": []}
        for n in degrees
    ]
    body = json.dumps({"predictions": rows}).encode()
    answered = None if ms is None else planned + ms / 1000
    return Exchange(number, planned, planned + 0.001, answered, status, body)


STEP = [
    exchange(0, 0.5, 10, 0, 0),
    exchange(1, 1.0, 20, 0, 0),
    exchange(2, 1.2, 40, 3, 3),
    exchange(3, 1.9, 150, 3, 5),
    exchange(4, 2.0, 1, status=429),
    exchange(5, 2.5, 1, status=503),
    exchange(6, 2.9, 30, 5, 5),
    exchange(7, 2.95, 1, status=500),
    exchange(8, 3.1, 50, 1, 1),
    exchange(9, 3.2, 10, 0, 0),
    exchange(10, 3.3, 10, 0, 0),
    exchange(11, 3.5, None, status=None),
]


def of(exchanges, *, end=3.0, seconds=4.0):
    times = np.array([one.planned for one in exchanges])
    return parse_outcome(Load(times, seconds, 1.0, end), exchanges, each=2, slo=0.1)


def test_the_part_that_counts():
    row = of(STEP).row()
    assert (row["requests"], row["answered"], row["refused"], row["errors"]) == (7, 4, 2, 1)
    assert row["goodput"] == 2 * 3 / 2.0  # images of requests 1, 2 and 6, over two seconds
    assert row["within"] == 0.75
    assert row["p50_ms"] == pytest.approx(35)
    assert row["p99_ms"] == pytest.approx(150, rel=0.03)
    assert row["degree"] == (0 + 0 + 3 + 3 + 3 + 5 + 5 + 5) / 8
    assert row["queue_ms"] == 1 + row["degree"]
    assert (row["batch"], row["compute_ms"]) == (2, 9)


def test_a_request_without_answer_is_an_error():
    assert of(STEP, end=4.0).row()["errors"] == 2


def test_the_dial_is_back_with_the_first_answer_after_which_all_are_whole():
    # The answer of request 9 comes at 3.21, that of request 8, reduced, at 3.15.
    assert of(STEP).back() == pytest.approx(0.21)


def test_an_answer_that_comes_late_counts_when_it_comes():
    late = [*STEP[:8], exchange(8, 3.1, 500, 1, 1), *STEP[9:]]
    assert of(late).back() is None  # it is the last one


def test_a_dial_that_was_never_turned_is_back_at_once():
    assert of([exchange(0, 1.5, 10, 0), exchange(1, 3.5, 10, 0)]).back() == 0.0


def test_nothing_goes_back_where_the_load_does_not_fall():
    assert of(STEP, end=4.0).back() is None


def test_second_by_second():
    seconds = of(STEP).by_second()
    assert [second["asked"] for second in seconds] == [2, 6, 8, 8]
    assert [second["good"] for second in seconds] == [2, 4, 2, 6]
    assert [second["degree"] for second in seconds] == pytest.approx([0, 14 / 6, 5, 2 / 6])
    assert of([exchange(0, 1.5, 10, 0)]).by_second()[0]["degree"] is None


def test_how_late_requests_left():
    assert of(STEP).late() == pytest.approx(1.0)


class Pairs:
    """Shows what is judged."""

    def score(self, answers):
        return [(image, prediction["degree"]) for image, prediction in answers]


def test_all_images_weigh_the_same():
    groups = [[0, 1], [2, 3]]
    # Requests 2 and 6 carried the first group, 1 and 3 the second.
    told = [(0, 3), (1, 3), (0, 5), (1, 5), (2, 0), (3, 0), (2, 3), (3, 5)]
    assert sorted(of(STEP).score(Pairs(), groups)) == sorted(told)
    assert of(STEP[:6]).score(Pairs(), groups) == [(2, 0), (3, 0), (0, 3), (1, 3)]


def test_a_server_that_answers_nobody():
    row = of([exchange(0, 1.5, 1, status=429)]).row()
    assert (row["answered"], row["goodput"]) == (0, 0)
    assert all(row[key] is None for key in ("within", "p50_ms", "p99_ms", "degree", "back_s"))


def test_images_that_were_answered_twice_are_counted():
    shown = {"batch": 1, "queue_ms": 0.0, "compute_ms": 1.0}
    rows = [
        {"degree": 0, "unsure_at": [3]} | shown,
        {"degree": 3, "unsure_at": [3]} | shown,  # there was no time for a second answer
        {"degree": 3, "unsure_at": []} | shown,
        {"degree": 3, "unsure_at": [5, 3]} | shown,
    ]
    body = json.dumps({"predictions": rows}).encode()
    played = of([Exchange(0, 1.0, 1.0, 1.1, 200, body)])
    assert played.row()["twice"] == 0.5
