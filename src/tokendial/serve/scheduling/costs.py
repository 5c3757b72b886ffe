"""How long batches take on this machine: measured at start-up, kept up to date from then on."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence

_LEARNT = 0.05
"""Share of a surprise that is put down to the machine, and again to the degree."""
_CLIPPED = math.log(2)
"""The largest surprise that counts, as a logarithm: one pause says nothing about the next batch."""
_FADES_S = 20.0
"""Seconds of idleness after which a third of what was learnt is left."""
_DEVIATIONS = 4.0
"""Mean deviations that a cautious estimate lies above the mean, as in TCP's timer (RFC 6298)."""

Point = tuple[str, int]
"""A model by its name, at a degree."""


class Costs:
    """Seconds of a batch, by name, degree and number of images.

    Measured sizes are joined by straight lines. Each batch that ran teaches two factors: one for
    the machine, which may be busy, and one for its degree, whose measurement may have been off.
    """

    def __init__(self, measured: Mapping[Point, Mapping[int, float]]) -> None:
        """Take measurements.

        Args:
            measured: For each name and degree, seconds by number of images.

        Raises:
            ValueError: If there are none, or one is not positive.
        """
        bad = [(point, dict(of)) for point, of in measured.items() if not _usable(of)]
        if bad or not measured:
            raise ValueError(f"measured must be seconds above 0 by batch size, got {bad[:1]}.")
        self._sizes = {point: sorted(of) for point, of in measured.items()}
        # A larger batch never takes less time; where it seems to, a pause was measured.
        self._seconds = {
            point: _rising([of[size] for size in sorted(of)]) for point, of in measured.items()
        }
        self._machine = 0.0
        """Logarithm of the factor."""
        self._own = dict.fromkeys(measured, 0.0)
        self._spread = 0.05

    @property
    def points(self) -> Collection[Point]:
        """Every model and degree that was measured."""
        return self._sizes.keys()

    def seconds(self, name: str, degree: int, images: int) -> float:
        """The mean for a batch."""
        point = name, degree
        return self._measured(point, images) * math.exp(self._machine + self._own[point])

    def cautious(self, name: str, degree: int, images: int) -> float:
        """What a batch takes at most, nearly always."""
        return self.seconds(name, degree, images) * (1 + _DEVIATIONS * self._spread)

    def observe(self, name: str, degree: int, images: int, seconds: float) -> None:
        """Learn from a batch that has run."""
        surprise = math.log(max(seconds, 1e-9) / self.seconds(name, degree, images))
        surprise = min(max(surprise, -_CLIPPED), _CLIPPED)
        self._machine += _LEARNT * surprise
        self._own[name, degree] += _LEARNT * surprise
        self._spread += _LEARNT * (abs(surprise) - self._spread)

    def fade(self, seconds: float) -> None:
        """Forget a part of what was learnt: for so long nothing has run that could confirm it.

        Else a machine that was slow once, so that nothing could be promised any more, would be
        taken to be slow for ever.
        """
        kept = math.exp(-seconds / _FADES_S)
        self._machine *= kept
        self._own = {point: kept * own for point, own in self._own.items()}

    def _measured(self, point: Point, images: int) -> float:
        sizes, seconds = self._sizes[point], self._seconds[point]
        right = bisect_left(sizes, images)
        if right == len(sizes):
            # Beyond the largest: as the whole of it goes, and never below its price per image.
            return seconds[-1] * images / sizes[-1]
        if sizes[right] == images or right == 0:
            return seconds[right]
        left = right - 1
        share = (images - sizes[left]) / (sizes[right] - sizes[left])
        return seconds[left] + share * (seconds[right] - seconds[left])


def measured_costs(
    run: Callable[[str, int, int], float],
    names: Sequence[str],
    degrees: Sequence[int],
    *,
    most: int,
    within_s: float,
    repeats: int = 3,
) -> Costs:
    """Measure batches of 1, 2, 4, … images at every degree.

    Args:
        run: Runs a batch, told its name, degree and number of images; returns its seconds.
        names: Models.
        degrees: Degrees of the dial, of each.
        most: Images of the largest batch.
        within_s: Seconds after which no larger one is tried.
        repeats: Runs of each, of which the median counts.
    """
    measured: dict[Point, dict[int, float]] = {}
    for name in names:
        for degree in degrees:
            of = measured.setdefault((name, degree), {})
            images = 1
            while True:
                run(name, degree, images)  # the first one allocates
                times = sorted(run(name, degree, images) for _ in range(repeats))
                of[images] = times[repeats // 2]
                if images == most or of[images] > within_s:
                    break
                images = min(2 * images, most)
    return Costs(measured)


def _usable(seconds: Mapping[int, float]) -> bool:
    return bool(seconds) and all(size > 0 and time > 0 for size, time in seconds.items())


def _rising(values: Sequence[float]) -> list[float]:
    """Each at least as large as those before it."""
    return [max(values[: number + 1]) for number in range(len(values))]
