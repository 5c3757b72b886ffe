"""The search on costs and divergences that are known."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendial as td
from tokendial.shape import ViTShape
from tokendial.tune.agreement import Agreement
from tokendial.tune.block_costs import CostTable, coarse_counts, measure_blocks
from tokendial.tune.schedule_search import ScheduleSearch
from tokendial.tune.schedules import ScheduleSpace

DEPTH, PATCHES = 5, 24
METHODS = {
    "tome": td.ToMe(),
    "stride": td.ToMe(stride=4),
    "evit": td.EViT(),
    "drop": td.EViT(rest="drop"),
}


def space_of(name: str) -> ScheduleSpace:
    return ScheduleSpace(METHODS[name], ViTShape(DEPTH, 32, 1, PATCHES, has_class_token=True))


def table_of(space: ScheduleSpace, odd: float) -> CostTable:
    """Blocks in proportion to their tokens, dearer where the number of tokens is odd."""
    table = CostTable(space, base=0.5)
    block = {n: (n + odd * (n % 2)) / PATCHES for n in range(1, PATCHES + 1)}
    table.add(block, dict.fromkeys(block, 0.05), ffn=0.5 / PATCHES)
    return table


def judge_of(space: ScheduleSpace, weights: list[float]):
    """More tokens less in a layer never agree better; layers differ."""

    def judge(schedule):
        left = (PATCHES, *space.tokens_left(schedule))
        harms = [w * (1 - m / n) ** 1.5 for w, (n, m) in zip(weights, pairwise(left), strict=True)]
        return Agreement(sum(harms) * (1 + sum(harms)), 1.0)

    return judge


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(METHODS)),
    weights=st.lists(st.floats(0.0, 4.0), min_size=DEPTH, max_size=DEPTH),
    odd=st.floats(0.0, 3.0),
    shares=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
)
def test_what_is_found_fits_and_no_constant_schedule_that_fits_is_better(
    name, weights, odd, shares
):
    space = space_of(name)
    table = table_of(space, odd)
    search = ScheduleSearch(space, table, judge_of(space, weights), time_is_up=lambda: False)
    least = table.schedule_cost(space.strongest)
    found = []
    harder = None
    for share in sorted(shares):
        most = least + share * (table.schedule_cost(space.none) - least)
        harder = search.run(most, harder)
        found.append(harder)
        assert table.schedule_cost(harder) <= most + 1e-9
        assert space.normalise(harder) == harder
        fitting = [s for s in space.all_linear() if table.schedule_cost(s) <= most]
        # The mildest that fits is the best of them where a token less never costs more.
        if odd == 0.0 and fitting:
            assert search.divergence(harder) <= min(map(search.divergence, fitting)) + 1e-9
    divergences = [search.divergence(schedule) for schedule in found]
    assert divergences == sorted(divergences, reverse=True)
    kept = [sum(space.tokens_left(schedule)) for schedule in found]
    assert kept == sorted(kept)
    degrees = space.reduce.with_schedules(found[::-1]).build(space.shape)
    assert degrees.degrees == (0, 1, 2, 3)


def test_layers_that_harm_less_remove_more():
    space = space_of("tome")
    table = table_of(space, 0.0)
    weights = [4.0, 4.0, 0.1, 4.0, 4.0]
    search = ScheduleSearch(space, table, judge_of(space, weights), time_is_up=lambda: False)
    most = 0.7 * table.schedule_cost(space.none)
    found = search.run(most)
    constant = next(s for s in space.all_linear() if table.schedule_cost(s) <= most)
    assert max(found) == found[2]
    assert search.divergence(found) < 0.7 * search.divergence(constant)


def test_without_time_the_best_start_is_found():
    space = space_of("tome")
    table = table_of(space, 0.0)
    search = ScheduleSearch(space, table, judge_of(space, [1.0] * DEPTH), time_is_up=lambda: True)
    found = search.run(0.8 * table.schedule_cost(space.none))
    assert table.schedule_cost(found) <= 0.8 * table.schedule_cost(space.none)


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_a_given_schedule_is_scaled_to_the_limit(share):
    """Without time, a schedule of another cost leads to one that no simple schedule equals."""
    weights = [4.0, 4.0, 0.1, 4.0, 4.0]
    simple = space_of("tome")
    table = table_of(simple, 0.0)
    least, whole = (table.schedule_cost(s) for s in (simple.strongest, simple.none))
    most = least + share * (whole - least)
    given = ScheduleSpace(td.ToMe(r=[1, 1, 6, 1, 1]), simple.shape)
    divergences = []
    for space in (simple, given):
        judge = judge_of(space, weights)
        search = ScheduleSearch(space, table, judge, time_is_up=lambda: True)
        found = search.run(most)
        assert table.schedule_cost(found) <= most
        divergences.append(search.divergence(found))
    assert divergences[1] < divergences[0]


class Known:
    """A meter of blocks whose costs are known; every second round something else is running."""

    exact = False

    def __init__(self, space: ScheduleSpace) -> None:
        self.space, self.asked = space, 0

    def cost(self, n: int, m: int) -> float:
        return 3 * n + n * n / 50 + (2 + n / 10 if m < n else 0) - 2 * (n - m)

    def layer_costs(self, schedule, first, last):
        self.asked += 1
        left = [self.space.shape.num_patches, *self.space.tokens_left(schedule)]
        pairs = list(pairwise(left))[first - 1 : last]
        return [self.cost(n, m) * (1 + self.asked % 2) for n, m in pairs]

    def single_cost(self, schedule):
        return 7.0 + sum(self.layer_costs(schedule, 1, DEPTH))


@pytest.mark.parametrize("name", METHODS)
def test_the_table_takes_blocks_apart(name):
    space = space_of(name)
    meter, table = Known(space), CostTable(space_of(name))
    measure_blocks(table, meter, coarse_counts(PATCHES, 12), enough=lambda rounds: rounds >= 5)
    unit = meter.cost(PATCHES, PATCHES)
    assert table.ffn == pytest.approx(2 / unit)
    for schedule in (space.none, *space.all_linear()[:6], space.normalise([3, 0, 5, 0, 1])):
        known = 7.0 + sum(
            meter.cost(n, m) for n, m in pairwise((PATCHES, *space.tokens_left(schedule)))
        )
        assert table.schedule_cost(schedule) == pytest.approx(known / unit, rel=0.02)


def test_counts_that_no_schedule_leaves_in_time_are_passed_by():
    space = ScheduleSpace(td.ToMe(), ViTShape(2, 32, 1, PATCHES, has_class_token=True))
    table = CostTable(space)
    measure_blocks(table, Known(space), range(1, PATCHES + 1), enough=lambda rounds: True)
    assert sorted(table.block) == list(range(PATCHES // 2, PATCHES + 1))
