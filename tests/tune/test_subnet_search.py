"""The evolution of subnets: within the limit, no subnet twice, the same for the same seed."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendial as td
from tokendial.tune.subnet_search import Evolution, SubnetSearch

DEPTH = 6
SUPERNET = td.NOAHSupernet(prompts=(1, 5, 10), rank=(1, 5), dim=(2, 4), depths=(2, 4, 6))
SMALL = Evolution(population=8, parents=3, mutations=4, crossovers=4, rounds=4)


def total(subnet):
    return sum(map(sum, subnet.widths(DEPTH)))


def searched(judge=total, *, most=60, evolution=SMALL, supernet=SUPERNET):
    search = SubnetSearch(supernet, DEPTH, total, judge, most, evolution)
    return search, search.run()


@given(seed=st.integers(0, 999), most=st.integers(10, 150))
@settings(max_examples=10)
def test_subnets_are_of_the_supernet_and_within_the_limit(seed, most):
    search, best = searched(most=most, evolution=replace(SMALL, seed=seed))
    assert search.scores[best] == max(search.scores.values())
    for subnet in search.scores:
        assert total(subnet) <= most
        for name, widths in subnet.widths(DEPTH)._asdict().items():
            filled = sum(width > 0 for width in widths)
            assert filled in SUPERNET.depths
            assert {*widths[:filled]} <= {*getattr(SUPERNET, name)}
            assert widths[filled:] == (0,) * (DEPTH - filled)


def test_no_subnet_is_judged_twice():
    judged = []
    search, _ = searched(lambda subnet: judged.append(subnet) or 0.0)
    assert len(judged) == len({*judged}) == len(search.scores) == 8 + 4 * 8


def test_the_same_seed_gives_the_same_search():
    orders = [[*searched(evolution=replace(SMALL, seed=seed))[0].scores] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_evolution_finds_better_subnets_than_as_many_random_ones():
    """A score that needs the three parts to fit each other, averaged over seeds."""

    def judge(subnet):
        prompts, rank, dim = subnet.widths(DEPTH)
        return -abs(sum(prompts) - 31) - abs(sum(rank) - 13) - abs(sum(dim) - 19)

    long = Evolution(population=20, parents=5, mutations=10, crossovers=10, rounds=8)
    random = replace(long, mutations=0, crossovers=0)

    def mean(evolution):
        found = (searched(judge, evolution=replace(evolution, seed=s), most=99) for s in range(20))
        return sum(judge(best) for _, best in found) / 20

    assert mean(long) > mean(random)


def test_a_mutation_adds_blocks_with_drawn_widths_or_takes_them_away():
    evolution = replace(SMALL, mutation_probability=1.0, depth_probability=1.0)
    search = SubnetSearch(SUPERNET, DEPTH, total, total, 999, evolution)
    search.random = Random(0)
    parent = td.NOAH(prompts=[5, 10, 1, 5, 0, 0], rank=[5, 1, 0, 0, 0, 0], dim=[2, 2, 4, 4, 2, 4])
    seen = set()
    for _ in range(60):
        for old, new in zip(parent.widths(6), search._mutate([parent]).widths(6), strict=True):
            filled = sum(width > 0 for width in new)
            both = min(filled, sum(width > 0 for width in old))
            assert new[:both] == old[:both]
            seen.add(filled - sum(width > 0 for width in old))
    assert seen == {-4, -2, 0, 2, 4}
    search.evolution = replace(evolution, mutation_probability=0.0)
    assert search._mutate([parent]) == SUPERNET.subnet(parent.widths(6)._asdict())


def test_a_crossover_takes_each_kind_of_one_parent():
    search = SubnetSearch(SUPERNET, DEPTH, total, total, 999, SMALL)
    search.random = Random(0)
    pair = [td.NOAH(prompts=[n] * 6, rank=[n] * 6, dim=[n] * 6) for n in (1, 2)]
    children = {tuple(w[0] for w in search._combine(pair).widths(6)) for _ in range(100)}
    assert children == {(a, b, c) for a in (1, 2) for b in (1, 2) for c in (1, 2)}


def test_a_limit_that_only_the_smallest_subnet_meets():
    least = total(SUPERNET.draw(DEPTH, min))
    search, best = searched(most=least)
    assert best == SUPERNET.draw(DEPTH, min)
    assert len(search.scores) == 1
    with pytest.raises(ValueError, match=f"max_parameters must be at least {least}, which the"):
        searched(most=least - 1)


def test_a_search_of_all_subnets_ends():
    tiny = td.NOAHSupernet(prompts=(1,), rank=(1, 2), dim=(1,), depths=(1,))
    search, best = searched(supernet=tiny)
    assert len(search.scores) == 2
    assert best.rank[0] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 0}, "population must be an integer of at least 1, got 0"),
        ({"parents": 0}, "parents must be an integer of at least 1, got 0"),
        ({"rounds": -1}, "rounds must be an integer of at least 0, got -1"),
        ({"mutation_probability": 1.5}, "mutation_probability must be at most 1, got 1.5"),
        ({"depth_probability": -1}, "depth_probability must be a number of at least 0, got -1"),
        ({"population": 49}, r"population must be at least mutations \+ crossovers \(50\), got 49"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Evolution(**changes)
