"""Cost of a block by its number of tokens, and from it the cost of any schedule.

All blocks of a ViT cost the same. A block that n patch tokens enter and m leave costs

    block(n) + [m < n] step(n) - ffn * (n - m)

where block(n) is a block without reduction, step(n) the work of the reduction itself, and ffn the
cost of one token in the FFN, which runs on the remaining tokens only. All three are measured by
running the model up to a block that n tokens enter, so they include whatever a block contains
(adapters, token sizes, rotary positions). Between measured counts the table is linear. Each number
is the minimum of several rounds, because other programs on the machine only ever add time. The unit
is one block that every token enters and leaves.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

from tokendial.tune.cost_meters import LayerMeter
from tokendial.tune.schedules import Schedule, ScheduleSpace

_TIMED_COUNTS, _COUNTED_COUNTS = 32, 8
"""Approximate numbers of token counts in the first table: of times, and of exact costs."""
_ROUNDS = 9
"""Rounds in which times are measured, if there is time for them."""
_REFINING_ROUNDS = 2
_PLAIN = 2
"""Number of consecutive blocks without reduction in one measurement."""


@dataclass
class CostTable:
    """Measured costs of blocks, by the number of patch tokens that enter them."""

    space: ScheduleSpace
    """The schedules whose cost the table gives."""
    base: float = 0.0
    """Cost outside of the blocks: embedding and head."""
    block: dict[int, float] = field(default_factory=dict)
    """Cost of a block without reduction, by the number of tokens that enter it."""
    step: dict[int, float] = field(default_factory=dict)
    """Additional cost of a block that removes tokens, without the FFN."""
    ffn: float = 0.0
    """Cost of one token in the FFN."""

    def __post_init__(self) -> None:
        self._block: list[float] = []
        self._step: list[float] = []

    def block_cost(self, entering: int, leaving: int) -> float:
        """Cost of one block that `entering` tokens enter and `leaving` tokens leave."""
        if leaving == entering:
            return self._block[entering]
        cost = self._block[entering] + self._step[entering] - self.ffn * (entering - leaving)
        return max(cost, 0.0)

    def schedule_cost(self, schedule: Schedule) -> float:
        """Cost of a forward pass by `schedule`."""
        counts = (self.space.shape.num_patches, *self.space.tokens_left(schedule))
        return self.base + sum(self.block_cost(*pair) for pair in pairwise(counts))

    def add(self, block: Mapping[int, float], step: Mapping[int, float], ffn: float) -> None:
        """Add measured costs to the table."""
        self.block |= block
        self.step |= step
        self.ffn = ffn
        num_patches = self.space.shape.num_patches
        self._block = _interpolate(self.block, num_patches)
        self._step = _interpolate(self.step, num_patches)


class BlockCosts:
    """Measures the costs of blocks, by the number of tokens that enter them."""

    def __init__(self, space: ScheduleSpace, meter: LayerMeter) -> None:
        self.meter, self.table = meter, CostTable(space)

    def measure(self, late: Callable[[], bool], note: Callable[[str], None]) -> None:
        """Measure blocks at numbers of tokens that are spread over all."""
        exact = self.meter.exact
        counts = coarse_counts(
            self.table.space.shape.num_patches, _COUNTED_COUNTS if exact else _TIMED_COUNTS
        )
        note(f"measuring blocks at {len(counts)} numbers of tokens")
        measure_blocks(
            self.table,
            self.meter,
            counts,
            enough=lambda rounds: exact or late() or rounds >= _ROUNDS,
        )

    def refine(self, schedule: Schedule) -> None:
        """Measure the blocks of a schedule, too, unless costs are exact."""
        if not self.meter.exact:
            space = self.table.space
            counts = set(space.tokens_left(schedule)) - {space.shape.num_patches}
            measure_blocks(
                self.table, self.meter, counts, enough=lambda rounds: rounds >= _REFINING_ROUNDS
            )


def coarse_counts(num_patches: int, counts: int) -> list[int]:
    """About `counts` evenly spaced numbers of tokens, for the first table of a model.

    The first two are `num_patches` and one less: from the first merge on, blocks also handle token
    sizes, which costs a little.
    """
    gap = max(1, round(num_patches / counts))
    return sorted({num_patches, num_patches - 1, *range(gap, num_patches, gap)}, reverse=True)


def measure_blocks(
    table: CostTable, meter: LayerMeter, counts: Iterable[int], *, enough: Callable[[int], bool]
) -> None:
    """Measure blocks that the given numbers of tokens enter, and add them to the table.

    Args:
        table: The table to extend; its other entries are kept.
        meter: Measures the costs of layers.
        counts: Numbers of patch tokens. A number that no schedule reaches before the last layer is
            skipped.
        enough: Takes the number of rounds so far, and says whether to stop; asked after each round.
    """
    space = table.space
    runs = [run for count in counts for run in _measurements(space, count)]
    seen: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    units: list[float] = []
    wholes: list[float] = []
    # All counts are measured in every round, so that a machine that is busy for a while does not
    # spoil a few of them.
    while not wholes or not enough(len(wholes)):
        units += meter.layer_costs(space.none, 2, space.shape.depth)
        wholes.append(meter.single_cost(space.none))
        for schedule, first, last in runs:
            numbers = (space.shape.num_patches, *space.tokens_left(schedule))
            for layer, cost in enumerate(meter.layer_costs(schedule, first, last), start=first):
                seen[numbers[layer - 1], numbers[layer]].append(cost)
    unit = min(units)
    table.base = table.base or max(0.0, min(wholes) / unit - space.shape.depth)
    _fill(table, {pair: min(costs) / unit for pair, costs in seen.items()})


def _measurements(space: ScheduleSpace, count: int) -> list[tuple[Schedule, int, int]]:
    """Schedules that bring `count` tokens to a layer, and which layers of them to measure.

    The measured layers remove nothing, except for the last one, which removes few or many tokens.
    """
    reaching, depth = space.shortest_to(count), space.shape.depth
    # The time of the first layer includes the embedding, so it is not measured.
    first = max(2, len(reaching) + 1)
    last = min(first + _PLAIN, depth)
    if first > depth or (space.tokens_left(reaching) or (space.shape.num_patches,))[-1] != count:
        return []
    plain = reaching + (0,) * (last - len(reaching))
    if last == first:
        return [(space.normalise(plain + (0,) * (depth - last)), first, last)]
    amounts = sorted({min(1, space.reduce.max_removed(count)), space.reduce.max_removed(count)})
    return [
        (space.normalise((*plain[:-1], some) + (0,) * (depth - last)), first, last)
        for some in amounts
    ]


def _fill(table: CostTable, costs: Mapping[tuple[int, int], float]) -> None:
    """Split the costs {(entering, leaving): cost} into block, step and FFN."""
    block = {n: cost for (n, m), cost in costs.items() if n == m}
    acting: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    for (n, m), cost in sorted(costs.items(), reverse=True):
        if m < n and n in block:
            acting[n].append((n - m, cost - block[n]))
    pairs = [some for some in acting.values() if len(some) == 2]
    slopes = [(few[1] - many[1]) / (many[0] - few[0]) for few, many in pairs]
    # Only from the first, coarse counts: a few more would not make the estimate better.
    ffn = max(0.0, median(slopes)) if slopes and not table.block else table.ffn
    step = {
        n: max(0.0, mean(more + ffn * removed for removed, more in some))
        for n, some in acting.items()
    }
    table.add(block, step, ffn)


def _interpolate(values: Mapping[int, float], num_patches: int) -> list[float]:
    """Values for each count up to `num_patches`: linear between known counts, constant beyond."""
    counts = sorted(values)
    if not counts:
        return [0.0] * (num_patches + 1)
    dense = [values[counts[0]]] * (counts[0] + 1)
    for low, high in pairwise(counts):
        rise = (values[high] - values[low]) / (high - low)
        dense += [values[low] + rise * n for n in range(1, high - low + 1)]
    return dense + [values[counts[-1]]] * (num_patches - counts[-1])
