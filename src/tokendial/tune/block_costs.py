"""A table of what blocks cost by the number of tokens, and from it the cost of any schedule.

All blocks are alike. One that n patch tokens enter and m leave costs

    block(n) + [m < n] step(n) - ffn * (n - m)

with the whole block on n tokens, the reduction's own step, and the FFN, which runs on the tokens
that are left. The three are measured by running the model itself up to a block that n tokens enter,
so that whatever stands in a block (adapters, token sizes, rotary positions) is in them. Between
counts that were measured the table is linear. Each number is the least of several rounds, since
whatever else runs on a machine only adds to it; all are told in units of a block that every token
enters and leaves.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

from tokendial.tune.cost_meters import CostMeter
from tokendial.tune.schedules import Schedule, ScheduleSpace

_PLAIN = 2
"""Blocks that run in a row on the same tokens, in one measurement."""


@dataclass
class CostTable:
    """Costs by the number of patch tokens that enter a block."""

    space: ScheduleSpace
    """Of the schedules."""
    base: float = 0.0
    """What does not lie in blocks: embedding and head."""
    block: dict[int, float] = field(default_factory=dict)
    """A block that removes nothing."""
    step: dict[int, float] = field(default_factory=dict)
    """What a block costs more that removes a token, the FFN apart."""
    ffn: float = 0.0
    """One token in the FFN."""

    def __post_init__(self) -> None:
        self._block: list[float] = []
        self._step: list[float] = []

    def of_block(self, entering: int, leaving: int) -> float:
        """Cost of one block."""
        if leaving == entering:
            return self._block[entering]
        cost = self._block[entering] + self._step[entering] - self.ffn * (entering - leaving)
        return max(cost, 0.0)

    def of(self, schedule: Schedule) -> float:
        """Cost of a forward pass."""
        counts = (self.space.shape.num_patches, *self.space.left(schedule))
        return self.base + sum(self.of_block(*pair) for pair in pairwise(counts))

    def add(self, block: Mapping[int, float], step: Mapping[int, float], ffn: float) -> None:
        """Take in what was measured."""
        self.block |= block
        self.step |= step
        self.ffn = ffn
        num_patches = self.space.shape.num_patches
        self._block = _between(self.block, num_patches)
        self._step = _between(self.step, num_patches)


def coarse_counts(num_patches: int, counts: int) -> list[int]:
    """About so many numbers of tokens, evenly spaced, for the first table of a model.

    The first two are `num_patches` and one less: sizes of tokens, and what is done with them, come
    into being when the first ones merge.
    """
    gap = max(1, round(num_patches / counts))
    return sorted({num_patches, num_patches - 1, *range(gap, num_patches, gap)}, reverse=True)


def measure_blocks(
    table: CostTable, meter: CostMeter, counts: Iterable[int], *, enough: Callable[[int], bool]
) -> None:
    """Fill in the costs of blocks that so many tokens enter; what was there is kept.

    Args:
        table: Where to.
        meter: Tells costs of layers.
        counts: Patch tokens; those that no schedule has left before the last layer are passed by.
        enough: Whether so many rounds are; asked after each.
    """
    space = table.space
    runs = [run for count in counts for run in _runs(space, count)]
    seen: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    units: list[float] = []
    wholes: list[float] = []
    # In rounds, so that a machine that is busy for a while does not spoil some of the counts.
    while not wholes or not enough(len(wholes)):
        units += meter.layers(space.none, 2, space.shape.depth)
        wholes.append(meter.one(space.none))
        for schedule, first, last in runs:
            numbers = (space.shape.num_patches, *space.left(schedule))
            for layer, cost in enumerate(meter.layers(schedule, first, last), start=first):
                seen[numbers[layer - 1], numbers[layer]].append(cost)
    unit = min(units)
    table.base = table.base or max(0.0, min(wholes) / unit - space.shape.depth)
    _fill(table, {pair: min(costs) / unit for pair, costs in seen.items()})


def _runs(space: ScheduleSpace, count: int) -> list[tuple[Schedule, int, int]]:
    """Schedules with layers that `count` tokens enter: some remove none, then one few or many."""
    reaching, depth = space.reaching(count), space.shape.depth
    # The first layer holds the embedding, too.
    first = max(2, len(reaching) + 1)
    last = min(first + _PLAIN, depth)
    if first > depth or (space.left(reaching) or (space.shape.num_patches,))[-1] != count:
        return []
    plain = reaching + (0,) * (last - len(reaching))
    if last == first:
        return [(space.normal(plain + (0,) * (depth - last)), first, last)]
    amounts = sorted({min(1, space.most(count)), space.most(count)})
    return [
        (space.normal((*plain[:-1], some) + (0,) * (depth - last)), first, last) for some in amounts
    ]


def _fill(table: CostTable, costs: Mapping[tuple[int, int], float]) -> None:
    """Take blocks apart: the whole, the step, and the FFN."""
    block = {n: cost for (n, m), cost in costs.items() if n == m}
    acting: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    for (n, m), cost in sorted(costs.items(), reverse=True):
        if m < n and n in block:
            acting[n].append((n - m, cost - block[n]))
    pairs = [some for some in acting.values() if len(some) == 2]
    slopes = [(few[1] - many[1]) / (many[0] - few[0]) for few, many in pairs]
    # Of the first, coarse counts: a few more do not tell it better.
    ffn = max(0.0, median(slopes)) if slopes and not table.block else table.ffn
    step = {
        n: max(0.0, mean(more + ffn * removed for removed, more in some))
        for n, some in acting.items()
    }
    table.add(block, step, ffn)


def _between(values: Mapping[int, float], num_patches: int) -> list[float]:
    """For each count up to `num_patches`: linear between those that are there, level beyond."""
    counts = sorted(values)
    if not counts:
        return [0.0] * (num_patches + 1)
    dense = [values[counts[0]]] * (counts[0] + 1)
    for low, high in pairwise(counts):
        rise = (values[high] - values[low]) / (high - low)
        dense += [values[low] + rise * n for n in range(1, high - low + 1)]
    return dense + [values[counts[-1]]] * (num_patches - counts[-1])
