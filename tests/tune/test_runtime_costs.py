"""Fits for other runtimes: the time of any schedule is estimated from whole passes by a few."""

import copy
from itertools import pairwise

import pytest
import torch
from examples import images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.shape import ViTShape
from tokendial.tune.cost_meters import try_schedules
from tokendial.tune.runtime_costs import (
    LEAST_EXAMPLES,
    RuntimeCosts,
    RuntimeStopwatch,
    example_schedules,
    fit_nonnegative,
)
from tokendial.tune.schedules import ScheduleSpace

METHODS = [td.ToMe(), td.EViT(rest="drop"), td.PiToMe()]


class Known:
    """A meter of passes whose times are known, with an error of up to 1 %."""

    exact, spread, start_seconds = False, 0.0, 1.0

    def __init__(self, space, ffn_share, noise=0.0):
        self.space, self.ffn_share, self.noise = space, ffn_share, noise
        self.measured = {}
        self.compare([space.none])

    def seconds(self, schedule):
        counts = pairwise((self.space.shape.num_patches, *self.space.tokens_left(schedule)))
        return 0.01 + sum(
            2e-4 * (n - self.ffn_share * (n - m)) + 1e-6 * n * n + (5e-4 + 1e-5 * n) * (m < n)
            for n, m in counts
        )

    def compare(self, schedules):
        for schedule in schedules:
            error = 1 + self.noise * (-1) ** len(self.measured)
            self.measured.setdefault(schedule, self.seconds(schedule) * error)
        return [self.measured[schedule] for schedule in schedules]


def costs_of(reduce, noise=0.0):
    model = td.wrap(tiny_vit(depth=6, img_size=64)).eval()
    with try_schedules(model, ScheduleSpace(reduce, model.anatomy.shape)) as scheduled_model:
        costs = RuntimeCosts(scheduled_model, None)
    costs.meter = Known(costs.space, costs.ffn_share, noise)
    return costs


@pytest.mark.parametrize("reduce", METHODS)
@pytest.mark.parametrize("late", [False, True])
def test_schedules_that_were_not_timed_are_estimated(reduce, late):
    """The FFN's share is counted, the other parts are found from the times."""
    costs, notes = costs_of(reduce), []
    costs.measure(lambda: late, notes.append)
    assert len(costs.meter.measured) >= LEAST_EXAMPLES
    assert (len(costs.meter.measured) > LEAST_EXAMPLES + 1) == (not late)
    assert 0.5 < costs.ffn_share < 0.7  # the FFN has 8 of the 12 D² products of a token
    space, table, meter = costs.space, costs.table, costs.meter
    whole = table.schedule_cost(space.none)
    for schedule in (*space.all_linear(), *space.all_linear(1.0), space.normalise([0, 3, 0, 4])):
        expected = meter.seconds(schedule) / meter.seconds(space.none)
        assert table.schedule_cost(schedule) / whole == pytest.approx(expected, rel=0.02)
    assert notes == [f"timing up to {len(example_schedules(space))} schedules; to start each takes "
                     "about 1 s"]  # fmt: skip


def test_errors_of_the_clock_change_little():
    costs = costs_of(td.ToMe(), noise=0.01)
    costs.measure(lambda: False, lambda text: None)
    space, table, meter = costs.space, costs.table, costs.meter
    whole = table.schedule_cost(space.none)
    for schedule in space.all_linear():
        expected = meter.seconds(schedule) / meter.seconds(space.none)
        assert table.schedule_cost(schedule) / whole == pytest.approx(expected, rel=0.05)
    found = space.normalise([0, 5, 1, 0, 2, 0])
    costs.refine(found)
    assert found in meter.measured


def test_examples_differ_and_every_number_can_be_found():
    for depth, patches in ((2, 16), (6, 64), (12, 196)):
        space = ScheduleSpace(td.ToMe(), ViTShape(depth, 32, 1, patches, has_class_token=True))
        examples = example_schedules(space)
        assert len(set(examples)) == len(examples)
        assert all(space.normalise(each) == each for each in examples)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 1000))
def test_nonnegative_numbers_are_found(numbers, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(8, 3, generator=draw, dtype=torch.float64) + 0.1
    wanted = torch.tensor(numbers, dtype=torch.float64) + 1e-3
    found = fit_nonnegative(rows, rows @ wanted)
    assert (found >= 0).all()
    torch.testing.assert_close(rows @ found, rows @ wanted, rtol=1e-6, atol=1e-9)
    # Values that ask for a number below 0 get the best ones that are not: none is better nearby.
    values = rows @ (wanted - torch.tensor([0.0, 0.0, 20.0], dtype=torch.float64)).abs()
    best = fit_nonnegative(rows, values)

    def error(x):
        return float((rows @ x / values - 1).norm())

    for column in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[column] = 1e-3
        for other in (best + step, (best - step).clamp(min=0)):
            assert error(best) <= error(other) + 1e-9


class Copies:
    """A runtime that is PyTorch itself: what it starts is a copy of the model as it is."""

    name = "onnxruntime"

    def start(self, model, images, *, degrees, quiet):
        assert degrees == [model.degree]
        return copy.deepcopy(model)


@torch.no_grad()
def test_a_fit_measures_in_the_runtime_and_leaves_the_model_alone():
    model = td.wrap(tiny_vit(depth=3, img_size=96)).eval()
    before = (model.reducer, model.degree)
    notes = []
    fitted = td.fit(
        model, images(24, 96, 96), speedup=1.1, runtime=Copies(), minutes=0.1, note=notes.append
    )
    assert (model.reducer, model.degree) == before
    assert any(line.startswith("timing up to") for line in notes)
    assert not any(line.startswith("measuring blocks") for line in notes)
    (row,) = fitted.degrees
    dial = td.wrap(model.vit, reduce=fitted.reduce).eval()
    # Times of a busy machine are rough, but what runs faster has to cost less.
    assert dial.cost(1).gmacs < dial.cost(0).gmacs
    assert row.found.cost == pytest.approx(1 / row.found.speedup)


@torch.no_grad()
def test_another_variant_of_the_method_is_timed_anew(monkeypatch):
    started = []
    monkeypatch.setattr(
        Copies,
        "start",
        lambda self, model, images, **_: started.append(model.reducer) or copy.deepcopy(model),
    )
    model = td.wrap(tiny_vit(depth=2)).eval()
    with try_schedules(model, ScheduleSpace(td.PruneMerge(), model.anatomy.shape)) as scheduled:
        stopwatch = RuntimeStopwatch(scheduled, images(2), Copies())
        for share in (0.5, 0.5, 1.0):
            scheduled.method = td.PruneMerge(prune_share=share)
            stopwatch.compare([scheduled.space.none, scheduled.space.strongest])
    unreduced, *others = started
    assert unreduced is None
    assert [reducer.config.prune_share for reducer in others] == [0.5, 1.0]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_schedules_are_timed_in_a_real_runtime():
    model = td.wrap(tiny_vit(depth=2)).eval()
    with try_schedules(model, ScheduleSpace(td.ToMe(), model.anatomy.shape)) as scheduled_model:
        stopwatch = RuntimeStopwatch(scheduled_model, images(2), td.Runtime("onnxruntime"))
        none, strongest = scheduled_model.space.none, scheduled_model.space.strongest
        whole, least = stopwatch.compare([none, strongest])
        assert stopwatch.compare([strongest, none]) == [least, whole]  # each is measured once
    assert stopwatch.measured == {none: whole, strongest: least}
    assert min(whole, least, stopwatch.start_seconds) > 0


@pytest.mark.parametrize(
    ("runtime", "budget", "message"),
    [
        (td.Runtime("auto"), {"speedup": 2}, "runtime must be one of onnxruntime, openvino, got"),
        (td.Runtime(optimize=True), {"speedup": 2}, "got torch"),
        (td.Runtime("openvino"), {"gmacs": 1}, "gmacs are counted, not timed: runtime openvino"),
    ],
)
def test_budgets_that_no_runtime_can_meet_raise(runtime, budget, message):
    with pytest.raises(ValueError, match=message):
        td.fit(td.wrap(tiny_vit()), images(8), runtime=runtime, **budget)
