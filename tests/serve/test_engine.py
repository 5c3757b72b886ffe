"""The engine, with its threads and a clock that the tests move on."""

import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
from simulation import NAME

from tokendial.cascade import CascadeCalibration, CascadeStages
from tokendial.serve.scheduling.controller import ControllerRules
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.scheduling.engine import Engine, WorkerLostError
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.scheduling.scheduler import Scheduler
from tokendial.serve.scheduling.second_answers import SecondAnswers

DEGREES = (0, 1, 2)
PATIENCE_S = 60.0


def wait_until(happened) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Clock:
    """Time that a test moves on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Gives back what it is given, with the degree; can be held and can fail."""

    def __init__(self):
        self.free = threading.Event()
        self.free.set()
        self.threads, self.ran = set(), []
        self.dies, self.limits = 0, []
        self.at_degree_0 = lambda: None

    def __call__(self, name, degree, images, limit_s):
        self.threads.add(threading.get_ident())
        self.limits.append(limit_s)
        if degree == 0:
            self.at_degree_0()
        assert self.free.wait(10 * PATIENCE_S)
        if "bad" in images:
            raise RuntimeError("this image is not for me")
        if self.dies:
            self.dies -= 1
            raise WorkerLostError("it has ended.")
        self.ran += images
        return [(name, degree, image) for image in images]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine(model, clock):
    measured = {(name, d): {1: 0.001, 8: 0.004} for name in (NAME, "cars") for d in DEGREES}
    scheduler = Scheduler(
        CostModel(measured), ControllerRules(5.0, DEGREES, max_batch=8), max_queue=20
    )
    engine = Engine(model, scheduler, clock=clock)
    engine.start()
    yield engine
    model.free.set()
    assert engine.drain(PATIENCE_S)


def test_results_have_the_order_of_the_images_and_their_degree(engine, model):
    futures = [
        engine.submit(name, [f"{number}a", f"{number}b"], degree=degree)
        for number, (name, degree) in enumerate([(NAME, 2), ("cars", None), (NAME, None)])
    ]
    first, second, third = (future.result(PATIENCE_S) for future in futures)
    assert [answer.output for answer in first] == [(NAME, 2, "0a"), (NAME, 2, "0b")]
    assert [answer.output for answer in second] == [("cars", 0, "1a"), ("cars", 0, "1b")]
    assert [answer.output for answer in third] == [(NAME, 0, "2a"), (NAME, 0, "2b")]
    assert all(answer.degree == answer.output[1] for answer in first + second + third)
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


def test_images_of_a_request_larger_than_a_batch_are_answered_together(engine):
    answers = engine.submit(NAME, list(range(20))).result(PATIENCE_S)
    assert [answer.output[2] for answer in answers] == list(range(20))
    assert max(answer.batch for answer in answers) <= 8


def test_waiting_images_run_in_one_batch(engine, model):
    model.free.clear()
    engine.submit(NAME, ["first"])
    wait_until(lambda: engine.status().running)
    futures = [engine.submit(NAME, [number]) for number in range(6)]
    assert engine.status().queued == 6
    model.free.set()
    wait(futures, PATIENCE_S)
    assert {future.result()[0].batch for future in futures} == {6}


def test_a_full_queue_and_a_deadline_that_cannot_be_made_are_refused_at_once(engine, model):
    model.free.clear()
    engine.submit(NAME, ["first"])
    with pytest.raises(RequestRefusedError, match="left") as late:
        engine.submit(NAME, ["hasty"], within_s=1e-4)
    assert late.value.reason == "late"
    wait_until(lambda: engine.status().running)
    engine.submit(NAME, list(range(20)))
    with pytest.raises(RequestRefusedError, match="at most 20 may wait") as full:
        engine.submit(NAME, ["one more"])
    assert full.value.reason == "full"
    assert full.value.retry_after_s > 0
    assert engine.status().refused == {"late": 1, "full": 1}


def test_check_refuses_what_submit_would_refuse(engine):
    engine.check(NAME, 20, within_s=1.0)
    with pytest.raises(RequestRefusedError, match="at most 20 may wait"):
        engine.check(NAME, 1, ahead=200)
    engine.check(NAME, 1, within_s=0.006, ahead=2)
    with pytest.raises(RequestRefusedError, match="left"):
        engine.check(NAME, 1, within_s=0.006, ahead=19)
    assert engine.status().refused == {"full": 1, "late": 1}
    assert engine.status().queued == 0


def test_the_expected_time_of_a_batch_is_known(engine):
    assert engine.seconds(NAME, 0) == pytest.approx(0.001)
    assert engine.seconds("cars", 2, 8) == pytest.approx(0.004)


def test_an_accepted_request_is_refused_when_the_machine_is_too_slow(engine, model, clock):
    model.free.clear()
    engine.submit(NAME, ["first"])
    wait_until(lambda: engine.status().running)
    future = engine.submit(NAME, ["second"], within_s=0.05)
    clock.now += 0.1  # the machine takes far longer for the first one than was measured
    model.free.set()
    with pytest.raises(RequestRefusedError, match="longer than expected"):
        future.result(PATIENCE_S)
    assert "second" not in model.ran


def test_a_batch_counts_as_stuck_after_ten_times_its_upper_bound(model):
    for seconds, limit_s in ((0.001, 2.0), (1.0, 12.0)):  # the upper bound is 1.2 s
        costs = CostModel({(NAME, 0): {1: seconds}})
        engine = Engine(model, Scheduler(costs, ControllerRules(60.0, (0,))))
        engine.start()
        engine.submit(NAME, ["image"]).result(PATIENCE_S)
        assert engine.drain(PATIENCE_S)
        assert model.limits.pop() == pytest.approx(limit_s, rel=0.01)


def test_cancelled_requests_do_not_run(engine, model):
    model.free.clear()
    engine.submit(NAME, ["first"])
    wait_until(lambda: engine.status().running)
    leaves = engine.submit(NAME, ["leaves"])
    stays = engine.submit(NAME, ["stays"])
    assert leaves.cancel()
    model.free.set()
    stays.result(PATIENCE_S)
    with pytest.raises(CancelledError):
        leaves.result(PATIENCE_S)
    assert model.ran == ["first", "stays"]


def test_a_failed_batch_raises_its_error_and_the_next_one_runs(engine, caplog):
    with pytest.raises(RuntimeError, match="not for me"):
        engine.submit(NAME, ["good", "bad"]).result(PATIENCE_S)
    assert engine.submit(NAME, ["good"]).result(PATIENCE_S)[0].output == (NAME, 0, "good")
    assert "a batch of 2 images failed" in caplog.text


def test_deadlines_hold_though_a_batch_does_not_end(engine, model, clock):
    model.free.clear()
    runs = engine.submit(NAME, ["runs"], within_s=0.3)
    wait_until(lambda: engine.status().running)
    waits = engine.submit(NAME, ["waits"], within_s=0.5)
    clock.now += 0.6
    for future in (runs, waits):
        with pytest.raises(RequestRefusedError, match="longer than expected") as refused:
            future.result(PATIENCE_S)
        assert refused.value.reason == "late"
    patient = engine.submit(NAME, ["patient"], within_s=60.0)
    model.free.set()
    assert patient.result(PATIENCE_S)[0].output == (NAME, 0, "patient")
    assert "waits" not in model.ran
    assert engine.status().refused == {"late": 2}


def test_a_batch_runs_a_second_time_when_its_process_is_lost(engine, model):
    model.dies = 1
    assert engine.submit(NAME, ["good"]).result(PATIENCE_S)[0].output == (NAME, 0, "good")
    model.dies = 2
    with pytest.raises(RequestRefusedError, match="again at a second attempt") as refused:
        engine.submit(NAME, ["deadly"]).result(PATIENCE_S)
    assert refused.value.reason == "lost"
    assert model.dies == 0
    assert engine.submit(NAME, ["good"]).result(PATIENCE_S)[0].output == (NAME, 0, "good")
    assert engine.status().refused == {"lost": 1}


def test_a_cancelled_batch_does_not_run_a_second_time(engine, model):
    model.free.clear()
    model.dies = 2
    leaves = engine.submit(NAME, ["leaves"])
    wait_until(lambda: engine.status().running)
    leaves.cancel()
    model.free.set()
    wait_until(lambda: not engine.status().running)
    assert model.dies == 1


def test_the_engine_is_ready_while_there_is_a_model_process(model):
    missing = [0.0]
    scheduler = Scheduler(CostModel({(NAME, 0): {1: 0.001}}), ControllerRules(5.0, (0,)))
    engine = Engine(model, scheduler, missing_s=lambda: missing[0])
    assert (engine.ready, engine.healthy) == (False, False)
    engine.start()
    assert (engine.ready, engine.healthy) == (True, True)
    missing[0] = 0.5
    assert (engine.ready, engine.healthy) == (False, True)
    missing[0] = 100.0
    assert (engine.ready, engine.healthy) == (False, False)
    assert engine.drain(PATIENCE_S)
    missing[0] = 0.0
    assert (engine.ready, engine.healthy) == (False, True)


def test_functions_are_called_between_batches(engine, model):
    assert engine.call_between_batches(threading.get_ident).result(PATIENCE_S) not in (
        None,
        threading.get_ident(),
    )
    with pytest.raises(ZeroDivisionError):
        engine.call_between_batches(lambda: 1 / 0).result(PATIENCE_S)
    assert engine.alive


def test_draining_answers_admitted_requests_and_refuses_new_ones(engine, model):
    model.free.clear()
    futures = [engine.submit(NAME, [number]) for number in range(10)]
    ended = []
    draining = threading.Thread(target=lambda: ended.append(engine.drain(PATIENCE_S)))
    draining.start()
    wait_until(lambda: engine.draining)
    for ask in (lambda: engine.submit(NAME, ["late"]), lambda: engine.call_between_batches(int)):
        with pytest.raises(RequestRefusedError) as refused:
            ask()
        assert refused.value.reason == "draining"
    model.free.set()
    draining.join()
    assert ended == [True]
    assert [future.result(0)[0].output[2] for future in futures] == list(range(10))
    assert not engine.alive


def test_every_batch_is_reported(model):
    seen = []
    engine = Engine(
        model,
        Scheduler(CostModel({(NAME, 0): {1: 0.001}}), ControllerRules(5.0, (0,))),
        on_batch=seen.append,
    )
    engine.start()
    wait([engine.submit(NAME, [number]) for number in range(30)], PATIENCE_S)
    assert engine.drain(PATIENCE_S)
    assert sum(batch.images for batch in seen) == 30
    assert all(len(batch.waited_s) == batch.images and batch.degree == 0 for batch in seen)


@pytest.fixture
def cascading(model, clock):
    """An engine whose dial stays at degree 2, with a cascade to degree 0; "?" is unsure."""
    calibration = CascadeCalibration(
        (0.5,), "changed", 0.1, 0.95, 99, 0, 0.1, (0.5,), ((0.0, 1.0),)
    )
    stages = CascadeStages((2, 0), calibration=calibration)
    measured = {(NAME, degree): {1: 0.001, 8: 0.004} for degree in DEGREES}
    scheduler = Scheduler(
        CostModel(measured),
        ControllerRules(5.0, (2,), max_batch=8),
        second_answers=SecondAnswers(lambda: stages),
    )
    engine = Engine(
        model,
        scheduler,
        how_sure=lambda images, outputs: [0.1 if "?" in image else 0.9 for image in images],
        clock=clock,
    )
    engine.start()
    yield engine
    model.free.set()
    assert engine.drain(PATIENCE_S)


def test_an_unsure_image_gets_the_answer_of_the_better_degree(cascading):
    sure, unsure, other = cascading.submit(NAME, ["a", "b?", "c"]).result(PATIENCE_S)
    assert (sure.degree, sure.unsure_at, sure.output) == (2, (), (NAME, 2, "a"))
    assert (unsure.degree, unsure.unsure_at, unsure.output) == (0, (2,), (NAME, 0, "b?"))
    assert (other.degree, other.batch, unsure.batch) == (2, 3, 1)
    (fixed,) = cascading.submit(NAME, ["d?"], degree=2).result(PATIENCE_S)
    assert (fixed.degree, fixed.unsure_at) == (2, ())
    status = cascading.status()
    assert (status.answered, status.cascade.sent_on) == (4, 1)


def test_times_of_both_answers_are_added(cascading, model, clock):
    def pass_time() -> None:
        clock.now += 0.25

    model.at_degree_0 = pass_time
    (answer,) = cascading.submit(NAME, ["a?"]).result(PATIENCE_S)
    assert (answer.degree, answer.unsure_at) == (0, (2,))
    assert answer.queue_s == pytest.approx(0)
    assert answer.compute_s == pytest.approx(0.25)


def test_the_first_answer_stays_if_the_second_batch_fails(cascading, model, caplog):
    def fail() -> None:
        raise RuntimeError("not at degree 0")

    model.at_degree_0 = fail
    (answer,) = cascading.submit(NAME, ["a?"]).result(PATIENCE_S)
    assert (answer.degree, answer.unsure_at) == (2, (2,))
    assert "a batch of 1 images failed" in caplog.text


def test_the_first_answer_stays_if_the_second_batch_does_not_end(cascading, model, clock):
    model.at_degree_0 = model.free.clear
    future = cascading.submit(NAME, ["a?", "b"], within_s=0.5)
    wait_until(lambda: len(model.limits) == 2)
    clock.now += 0.6
    answer, other = future.result(PATIENCE_S)
    assert (answer.degree, answer.unsure_at, other.degree) == (2, (2,), 2)
