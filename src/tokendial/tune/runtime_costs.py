"""Times of schedules in another runtime than PyTorch, and from them the time of any schedule.

A runtime runs whole exported models, so layers cannot be timed one by one. Some schedules are timed
instead, and the time of a pass is estimated as

    base + sum over blocks of  linear * (n - ffn * (n - m)) + attention * n²
                               + [m < n] (step + step_token * n)

where n patch tokens enter a block and m leave it, and `ffn` is the FFN's share of a block's linear
work, which is counted. The other five numbers are fitted to the times; none is negative.
"""

import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Protocol

import torch
from torch import Tensor

from tokendial.measure.timing import time_in_rounds
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.tune.block_costs import BlockCosts, CostTable, coarse_counts
from tokendial.tune.cost_meters import MIN_ROUNDS, MacCounter, ScheduledModel
from tokendial.tune.schedules import Schedule, ScheduleSpace

LEAST_EXAMPLES = 6
"""Fewest schedules that the estimate is fitted to: it has five unknown numbers."""
_EARLY = (0.5, 0.25, 0.75)
"""Shares of the patches that are left after the first layers of some examples."""
_CONSTANT = (0.5, 1.0, 0.25, 0.75)
"""Constant schedules among the examples, as shares of the way to the strongest one."""
_LISTED = 32
"""Approximate number of token counts at which the table lists costs."""
_SECONDS = 0.5
"""Time to spend on each of two schedules that are compared."""


class RuntimeChoice(Protocol):
    """A `tokendial.Runtime`."""

    @property
    def name(self) -> str:
        """Name of the runtime."""

    def start(
        self, model: DialViT, images: Tensor, *, degrees: Sequence[int], quiet: bool
    ) -> InferenceModel:
        """Make a model ready for inference."""


class RuntimeStopwatch:
    """Measures the seconds that a batch takes in a runtime.

    A model is started for each schedule, timed in turns with the unreduced one, and let go again.
    Each schedule is measured once, and again if another variant of the method follows it.
    """

    exact = False

    def __init__(
        self, scheduled_model: ScheduledModel, images: Tensor, runtime: RuntimeChoice
    ) -> None:
        """Start and time the unreduced model.

        Args:
            scheduled_model: The model to run by different schedules.
            images: A batch [B, 3, H, W].
            runtime: The runtime.
        """
        self.scheduled_model, self.images, self.runtime = scheduled_model, images, runtime
        self.spread = 0.0
        """Largest quartile spread of all comparisons, because each schedule is compared once."""
        begin = time.monotonic()
        self._unreduced = self._start(scheduled_model.space.none)
        self.start_seconds = time.monotonic() - begin
        """Time that starting a model takes."""
        none = scheduled_model.space.none
        self.measured: dict[Schedule, float] = {none: self._time(self._unreduced)[0]}
        """Seconds of every schedule that was measured."""
        self._followed_by: dict[Schedule, ScheduledConfig] = {}
        """The variant of the method that each of them was measured with."""

    def compare(self, schedules: Sequence[Schedule]) -> list[float]:
        """Times of forward passes, each measured in turns with the unreduced model."""
        none, method = self.scheduled_model.space.none, self.scheduled_model.method
        for schedule in schedules:
            if schedule != none and self._followed_by.get(schedule) != method:
                before, after = self._time(self._unreduced, self._start(schedule))
                self.measured[schedule] = self.measured[none] * after / before
                self._followed_by[schedule] = method
        return [self.measured[schedule] for schedule in schedules]

    def _start(self, schedule: Schedule) -> InferenceModel:
        model = self.scheduled_model.use(schedule)
        return self.runtime.start(model, self.images, degrees=[model.degree], quiet=True)

    @torch.inference_mode()
    def _time(self, *models: InferenceModel) -> list[float]:
        timings = time_in_rounds(
            models,
            lambda model: model,
            lambda model: model(self.images),
            device=torch.device("cpu"),
            seconds=_SECONDS,
            least_rounds=MIN_ROUNDS,
        )
        self.spread = max(self.spread, *(timing.spread for timing in timings))
        return [timing.seconds for timing in timings]


def example_schedules(space: ScheduleSpace) -> list[Schedule]:
    """Schedules that tell the parts of a pass's time apart, the most telling ones first."""
    patches, depth, lines = space.shape.num_patches, space.shape.depth, space.all_linear()

    def padded(first: Sequence[int]) -> Schedule:
        return space.normalise([*first, *[0] * depth][:depth])

    early = [padded(space.shortest_to(round(share * patches))) for share in _EARLY]
    constant = [lines[round(share * (len(lines) - 1))] for share in _CONSTANT]
    # One token in each layer shows what the steps cost by themselves, many in one layer what the
    # FFNs save behind it.
    one, many = space.linear(1), max(1, space.reduce.max_removed(patches) // 2)
    single = [padded([*[0] * before, many]) for before in (depth // 2, 1)]
    sloping = [space.linear(max(1, max(constant[0]) // 2), slope) for slope in (-1.0, 1.0)]
    first = [early[0], one, constant[0], early[1], constant[1], single[0]]
    rest = [constant[2], sloping[0], early[2], sloping[1], constant[3], single[1]]
    return [each for each in dict.fromkeys([*first, *rest]) if any(each)]


class RuntimeCosts:
    """Estimates the cost of any schedule in a runtime from the times of some."""

    def __init__(self, scheduled_model: ScheduledModel, meter: RuntimeStopwatch) -> None:
        self.space, self.meter = scheduled_model.space, meter
        self.table = CostTable(self.space)
        self.ffn_share = _ffn_share(scheduled_model)
        """Share of a block's linear work that the FFN does."""

    def measure(self, late: Callable[[], bool], note: Callable[[str], None]) -> None:
        """Time as many examples as there is time for."""
        examples = example_schedules(self.space)
        note(
            f"timing up to {len(examples)} schedules; to start each takes about "
            f"{self.meter.start_seconds:.0f} s"
        )
        for schedule in examples:
            if late() and len(self.meter.measured) > LEAST_EXAMPLES:
                break
            self.meter.compare([schedule])
        self._estimate()

    def refine(self, schedule: Schedule) -> None:
        """Time a schedule, too."""
        self.meter.compare([schedule])
        self._estimate()

    def _estimate(self) -> None:
        """Fit the unknown numbers to all times, and fill the table."""
        measured = self.meter.measured
        rows = torch.tensor([self._parts(s) for s in measured], dtype=torch.float64)
        seconds = torch.tensor(list(measured.values()), dtype=torch.float64)
        base, linear, attention, step, step_token = fit_nonnegative(rows, seconds).tolist()
        patches = self.space.shape.num_patches
        # If times do not depend on the tokens, any unit will do.
        unit = linear * patches + attention * patches**2 or 1.0
        counts = {1, *coarse_counts(patches, _LISTED)}
        self.table.base = base / unit
        self.table.add(
            {n: (linear * n + attention * n**2) / unit for n in counts},
            {n: (step + step_token * n) / unit for n in counts},
            linear * self.ffn_share / unit,
        )

    def _parts(self, schedule: Schedule) -> list[float]:
        """What the unknown numbers are multiplied by in the time of a schedule."""
        pairs = list(pairwise((self.space.shape.num_patches, *self.space.tokens_left(schedule))))
        acting = [n for n, m in pairs if m < n]
        linear = sum(n - self.ffn_share * (n - m) for n, m in pairs)
        return [1.0, linear, float(sum(n * n for n, _ in pairs)), float(len(acting)), sum(acting)]


def _ffn_share(scheduled_model: ScheduledModel) -> float:
    """Share of a block's linear work that the FFN does, by multiply-accumulates."""
    counted = BlockCosts(scheduled_model.space, MacCounter(scheduled_model))
    counted.measure(lambda: False, lambda text: None)
    block = counted.table.block
    # block(n) = linear * n + attention * n²
    few, many = min(block), max(block)
    attention = (block[many] / many - block[few] / few) / (many - few)
    return min(1.0, counted.table.ffn / (block[few] / few - attention * few))


def fit_nonnegative(rows: Tensor, values: Tensor) -> Tensor:
    """Numbers x of at least 0 with the smallest relative errors of `rows` x against `values`.

    The best ones are the unconstrained solution for the columns whose number is above 0. There are
    few columns, so all choices of them are tried.

    Args:
        rows: [M, K] float64, no column all zeros.
        values: [M] float64, above 0.

    Returns:
        [K].
    """
    scaled = rows / values[:, None]
    norms = scaled.norm(dim=0)
    scaled, ones = scaled / norms, torch.ones_like(values)
    count = rows.shape[1]
    best, least = torch.zeros(count, dtype=rows.dtype), float("inf")
    for size in range(1, count + 1):
        for columns in map(list, combinations(range(count), size)):
            found = torch.linalg.lstsq(scaled[:, columns], ones, driver="gelsd").solution
            error = float((scaled[:, columns] @ found - ones).norm())
            if bool((found >= 0).all()) and error < least:
                best = torch.zeros(count, dtype=rows.dtype)
                best[columns], least = found, error
    numbers: Tensor = best / norms
    return numbers
