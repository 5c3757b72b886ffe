"""The search for the schedule with the best agreement within a cost limit.

It starts from the mildest schedules within the limit of several kinds: those that the method lists,
scaled to the limit; the same number in each layer; numbers that fall or rise linearly with depth;
and the result of a dynamic programme over (layer, tokens left). The programme assumes that the
divergences of single layers add up, which they nearly do. A layer's divergence is measured by
reducing in that layer alone, at two fractions of the tokens, and modelled as a power of the
fraction.

Starting from the best of these, pairs of layers exchange tokens: one removes fewer, the other as
many more as the cost limit requires. Pairs are tried in the order of the divergence that each
layer's tokens cause per cost that they save, measured at the current schedule. The true divergence
decides whether an exchange is kept. The exchanged amount halves when no exchange is better. The
result is the best of all compared schedules, so it is never worse than the constant schedule.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tokendial.tune.agreement import Agreement
from tokendial.tune.block_costs import CostTable
from tokendial.tune.schedules import Schedule, ScheduleSpace

_SLOPES = (0.0, -1.0, -0.5, 0.5, 1.0)
_SHARES = (1 / 8, 3 / 8)
_GRID = 48
_PRICES = (-24.0, 24.0)
"""Range of the price, divergence per unreduced cost, as logarithms to base 2."""
_BISECTIONS = 16
_PAIRS_PER_LAYER = 2

Fits = Callable[[Schedule], bool]


@dataclass
class ScheduleSearch:
    """Searches schedules, and remembers the agreement of all that it has compared."""

    space: ScheduleSpace
    """The schedules to search."""
    table: CostTable
    """Costs of the schedules."""
    measure_agreement: Callable[[Schedule], Agreement]
    """Measures the agreement of a schedule with the unreduced model."""
    time_is_up: Callable[[], bool]
    """Whether the time for the search is over."""
    known: dict[Schedule, Agreement] = field(default_factory=dict)
    """Agreement of every schedule that was measured."""

    def divergence(self, schedule: Schedule) -> float:
        """Divergence of a schedule, measured the first time it is asked for."""
        if schedule not in self.known:
            self.known[schedule] = self.measure_agreement(schedule)
        return self.known[schedule].divergence

    def run(self, most: float, milder_than: Schedule | None = None) -> Schedule:
        """Find the schedule with the lowest divergence that costs no more than `most`.

        Args:
            most: Cost limit; the schedule that removes most is always allowed.
            milder_than: A schedule for a lower limit. It is allowed as a result, and the result
                keeps at least as many tokens as it does.
        """
        last = milder_than or self.space.strongest
        kept = sum(self.space.tokens_left(last))

        def fits(schedule: Schedule) -> bool:
            return (
                self.table.schedule_cost(schedule) <= most
                and sum(self.space.tokens_left(schedule)) >= kept
            )

        for start in (last, *self.starts(fits)):
            self.divergence(start)
        best = min((s for s in self.known if s == last or fits(s)), key=self.divergence)
        amount = max(1, self.space.shape.num_patches // 16)
        while amount and not self.time_is_up():
            better = self.exchange(best, amount, fits)
            if better == best:
                amount //= 2
            best = better
        return best

    def first_start(self, most: float) -> Schedule:
        """The first of the schedules that a search within a cost limit starts from."""
        starts = self.starts(lambda schedule: self.table.schedule_cost(schedule) <= most)
        return next(starts, self.space.strongest)

    def starts(self, fits: Fits) -> Iterator[Schedule]:
        """Schedules to start from; the first ones are those that the method lists."""
        for given in self.space.given:
            yield self._scale(given, fits)
        for slope in _SLOPES:
            if mildest := next((s for s in self.space.all_linear(slope) if fits(s)), None):
                yield mildest
        if not self.time_is_up():
            yield from self.by_layers(fits)

    def _scale(self, schedule: Schedule, fits: Fits) -> Schedule:
        """The mildest multiple of a schedule that fits, or the strongest one if none does."""
        fitting, low, high = self.space.strongest, 0.0, 2.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            scaled = self.space.scaled(schedule, middle)
            if fits(scaled):
                high, fitting = middle, scaled
            else:
                low = middle
        return fitting

    def exchange(self, best: Schedule, amount: int, fits: Fits) -> Schedule:
        """Exchange `amount` tokens between layers as long as that lowers the divergence."""
        rates = [self._harm_rate(best, layer, amount) for layer in range(len(best))]
        pairs = sorted(
            ((i, j) for i in range(len(best)) for j in range(len(best)) if i != j),
            # A layer of infinite rate is first among those that give, last among those that take.
            key=lambda pair: (rates[pair[1]] == math.inf, rates[pair[1]] - rates[pair[0]]),
        )
        for fewer, more in pairs[: _PAIRS_PER_LAYER * len(best)]:
            while not self.time_is_up() and (other := self._move(best, fewer, more, amount, fits)):
                if self.divergence(other) >= self.divergence(best):
                    break
                best = other
        return best

    def _harm_rate(self, schedule: Schedule, layer: int, amount: int) -> float:
        """Divergence per saved cost if `layer` removes `amount` more; infinite if none is saved."""
        more = self.space.normalise(_change(schedule, layer, amount))
        saved = self.table.schedule_cost(schedule) - self.table.schedule_cost(more)
        if saved <= 0 or self.time_is_up():
            return math.inf
        return (self.divergence(more) - self.divergence(schedule)) / saved

    def _move(
        self, schedule: Schedule, fewer: int, more: int, amount: int, fits: Fits
    ) -> Schedule | None:
        """Remove `amount` fewer tokens in one layer, and as few more as fit the limit in another.

        Returns None if nothing fits.
        """
        amount = min(amount, schedule[fewer])
        given = _change(schedule, fewer, -amount)
        for added in range(self.space.shape.num_patches if amount else 0):
            moved = self.space.normalise(_change(given, more, added))
            if fits(moved):
                return None if moved == schedule else moved
            if moved[more] < given[more] + added:
                break  # this layer cannot remove more
        return None

    def by_layers(self, fits: Fits) -> Iterator[Schedule]:
        """The best schedule if the divergences of single layers added up: a dynamic programme."""
        harm = [self._layer_divergence(layer) for layer in range(self.space.shape.depth)]
        low, high = _PRICES
        best = None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            schedule = self._cheapest_at(harm, 2.0**middle)
            if fits(schedule):
                high, best = middle, schedule
            else:
                low = middle
        if best:
            yield best

    def _layer_divergence(self, layer: int) -> Callable[[float], float]:
        """Divergence as a function of the fraction of tokens that one layer alone removes."""
        patches = self.space.shape.num_patches
        few, many = (
            self.space.normalise(_change(self.space.none, layer, max(1, round(share * patches))))
            for share in _SHARES
        )
        first, second = few[layer] / patches, many[layer] / patches
        small, large = (max(self.divergence(some), 1e-9) for some in (few, many))
        power = math.log(large / small) / math.log(second / first) if second > first else 1.0
        return lambda share: small * (share / first) ** max(power, 0.5)

    def _cheapest_at(self, harm: list[Callable[[float], float]], price: float) -> Schedule:
        """The schedule that minimises divergence plus `price` times its fraction of the cost."""
        patches, most = self.space.shape.num_patches, self.space.reduce.max_removed
        counts = range(patches, 0, -max(1, patches // _GRID))
        whole = self.table.schedule_cost(self.space.none)
        steps = {
            n: [
                (n - m, price * self.table.block_cost(n, m) / whole)
                for m in counts
                if 0 <= n - m <= most(n)
            ]
            for n in counts
        }
        ahead = dict.fromkeys(counts, 0.0)
        choices: list[dict[int, int]] = []
        for divergence in reversed(harm):
            best = {
                n: min((divergence(r / n) + cost + ahead[n - r], r) for r, cost in steps[n])
                for n in counts
            }
            ahead = {n: value for n, (value, _) in best.items()}
            choices.append({n: r for n, (_, r) in best.items()})
        schedule = []
        for choice in reversed(choices):
            schedule.append(choice[patches])
            patches -= choice[patches]
        return tuple(schedule)


def _change(schedule: Schedule, layer: int, by: int) -> Schedule:
    return tuple(r + by if number == layer else r for number, r in enumerate(schedule))
