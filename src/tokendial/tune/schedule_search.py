"""The search for the schedule that agrees best within a cost.

It starts from the mildest schedules that fit of several kinds: constant over the layers, as lines
that fall or rise with depth, and the one that a dynamic programme over (layer, tokens left) finds
when divergences of single layers add up, which they nearly do. Each layer's is measured by acting
there alone with two shares of the tokens, and taken as a power of the share in between.

From the best of these, layers exchange tokens: one removes fewer, another as many more as the cost
asks for. Which pairs are tried first follows from what each layer's tokens harm for the cost that
they save, measured at the schedule at hand; whether a pair is better is judged by the true
divergence. Exchanges halve when none is better. Since what is returned is the best of all that was
judged, it is never worse than the constant schedule that it started from.
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
"""Logarithms, to base 2, of divergence for the whole cost."""
_BISECTIONS = 16
_PAIRS_PER_LAYER = 2

Fits = Callable[[Schedule], bool]


@dataclass
class ScheduleSearch:
    """Finds schedules of a space, and keeps what it has seen."""

    space: ScheduleSpace
    """All schedules."""
    table: CostTable
    """Their costs."""
    judge: Callable[[Schedule], Agreement]
    """Their agreement with the model that removes nothing."""
    over: Callable[[], bool]
    """Whether there is no time left."""
    known: dict[Schedule, Agreement] = field(default_factory=dict)
    """What was judged."""

    def divergence(self, schedule: Schedule) -> float:
        """Of a schedule, judged once."""
        if schedule not in self.known:
            self.known[schedule] = self.judge(schedule)
        return self.known[schedule].divergence

    def run(self, most: float, milder_than: Schedule | None = None) -> Schedule:
        """The best schedule that costs no more than `most`.

        Args:
            most: Cost; what costs least of all is always allowed.
            milder_than: One that is allowed as well, and keeps no more tokens than what is found.
        """
        last = milder_than or self.space.strongest
        kept = sum(self.space.left(last))

        def fits(schedule: Schedule) -> bool:
            return self.table.of(schedule) <= most and sum(self.space.left(schedule)) >= kept

        for start in (last, *self.starts(fits)):
            self.divergence(start)
        best = min((s for s in self.known if s == last or fits(s)), key=self.divergence)
        amount = max(1, self.space.shape.num_patches // 16)
        while amount and not self.over():
            better = self.exchanged(best, amount, fits)
            if better == best:
                amount //= 2
            best = better
        return best

    def starts(self, fits: Fits) -> Iterator[Schedule]:
        """Schedules that just fit; the first one is constant over the layers."""
        for slope in _SLOPES:
            if mildest := next((s for s in self.space.lines(slope) if fits(s)), None):
                yield mildest
        if not self.over():
            yield from self.by_layers(fits)

    def exchanged(self, best: Schedule, amount: int, fits: Fits) -> Schedule:
        """What `best` becomes when layers exchange `amount` tokens as long as that is better."""
        rates = [self._harm(best, layer, amount) for layer in range(len(best))]
        pairs = sorted(
            ((i, j) for i in range(len(best)) for j in range(len(best)) if i != j),
            # Infinite rates first as those that give, last as those that take.
            key=lambda pair: (rates[pair[1]] == math.inf, rates[pair[1]] - rates[pair[0]]),
        )
        for fewer, more in pairs[: _PAIRS_PER_LAYER * len(best)]:
            while not self.over() and (other := self._moved(best, fewer, more, amount, fits)):
                if self.divergence(other) >= self.divergence(best):
                    break
                best = other
        return best

    def _harm(self, schedule: Schedule, layer: int, amount: int) -> float:
        """Divergence for the cost that `amount` tokens more save; infinite where they save none."""
        more = self.space.normal(_changed(schedule, layer, amount))
        saved = self.table.of(schedule) - self.table.of(more)
        if saved <= 0 or self.over():
            return math.inf
        return (self.divergence(more) - self.divergence(schedule)) / saved

    def _moved(
        self, schedule: Schedule, fewer: int, more: int, amount: int, fits: Fits
    ) -> Schedule | None:
        """`amount` tokens less in one layer, as few more as fit in another; None: nothing fits."""
        amount = min(amount, schedule[fewer])
        given = _changed(schedule, fewer, -amount)
        for added in range(self.space.shape.num_patches if amount else 0):
            moved = self.space.normal(_changed(given, more, added))
            if fits(moved):
                return None if moved == schedule else moved
            if moved[more] < given[more] + added:
                break  # no more can go there
        return None

    def by_layers(self, fits: Fits) -> Iterator[Schedule]:
        """The best schedule if divergences of single layers add up: a dynamic programme."""
        harm = [self._powers(layer) for layer in range(self.space.shape.depth)]
        low, high = _PRICES
        best = None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            schedule = self._priced(harm, 2.0**middle)
            if fits(schedule):
                high, best = middle, schedule
            else:
                low = middle
        if best:
            yield best

    def _powers(self, layer: int) -> Callable[[float], float]:
        """Divergence by the share of the tokens that goes in one layer alone."""
        patches = self.space.shape.num_patches
        few, many = (
            self.space.normal(_changed(self.space.none, layer, max(1, round(share * patches))))
            for share in _SHARES
        )
        first, second = few[layer] / patches, many[layer] / patches
        small, large = (max(self.divergence(some), 1e-9) for some in (few, many))
        power = math.log(large / small) / math.log(second / first) if second > first else 1.0
        return lambda share: small * (share / first) ** max(power, 0.5)

    def _priced(self, harm: list[Callable[[float], float]], price: float) -> Schedule:
        """The schedule with the least divergence plus `price` times its share of the whole cost."""
        patches, most = self.space.shape.num_patches, self.space.most
        counts = range(patches, 0, -max(1, patches // _GRID))
        whole = self.table.of(self.space.none)
        steps = {
            n: [
                (n - m, price * self.table.of_block(n, m) / whole)
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


def _changed(schedule: Schedule, layer: int, by: int) -> Schedule:
    return tuple(r + by if number == layer else r for number, r in enumerate(schedule))
