"""Predicted time of a batch on this machine: measured at start-up, corrected by every batch."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence

_LEARNING_RATE = 0.05
"""Fraction of the log prediction error that a batch adds to each of the two correction factors
(machine, degree)."""
_MAX_LOG_ERROR = math.log(2)
"""Largest log prediction error that is learnt from one batch: a single pause of the machine says
nothing about the next batch."""
_DECAY_S = 20.0
"""Idle seconds after which the corrections have decayed to 1/e (about a third)."""
_DEVIATIONS = 4.0
"""Mean deviations between the mean and the upper bound, as in TCP's timer (RFC 6298)."""

ModelDegree = tuple[str, int]
"""A model, by its name, at a degree."""


class CostModel:
    """Predicts the seconds of a batch from the model's name, the degree and the number of images.

    Times between two measured batch sizes are interpolated linearly. The prediction is

        measured(name, degree, images) * exp(machine + own[name, degree])

    where the two corrections are learnt: `machine` because other programs may slow the machine
    down, `own` because the measurement of one degree may have been disturbed. Both are logarithms
    and start at 0.
    """

    def __init__(self, measured: Mapping[ModelDegree, Mapping[int, float]]) -> None:
        """Build the model from measurements.

        Args:
            measured: For each model and degree, seconds by number of images.

        Raises:
            ValueError: If there is no measurement, or one is not positive.
        """
        bad = [(point, dict(by_size)) for point, by_size in measured.items() if not _valid(by_size)]
        if bad or not measured:
            raise ValueError(f"measured must be seconds above 0 by batch size, got {bad[:1]}.")
        self._sizes = {point: sorted(by_size) for point, by_size in measured.items()}
        # A larger batch never takes less time. Where it seems to, the smaller one was disturbed.
        self._seconds = {
            point: _running_maximum([by_size[size] for size in sorted(by_size)])
            for point, by_size in measured.items()
        }
        self._machine = 0.0
        self._own = dict.fromkeys(measured, 0.0)
        self._mean_deviation = 0.05

    @property
    def points(self) -> Collection[ModelDegree]:
        """Every model and degree that was measured."""
        return self._sizes.keys()

    def seconds(self, name: str, degree: int, images: int) -> float:
        """Expected seconds of a batch."""
        point = name, degree
        return self._interpolate(point, images) * math.exp(self._machine + self._own[point])

    def upper_bound(self, name: str, degree: int, images: int) -> float:
        """Seconds that a batch will almost certainly not exceed."""
        return self.seconds(name, degree, images) * (1 + _DEVIATIONS * self._mean_deviation)

    def observe(self, name: str, degree: int, images: int, seconds: float) -> None:
        """Learn from the measured time of a batch that has run."""
        error = math.log(max(seconds, 1e-9) / self.seconds(name, degree, images))
        error = min(max(error, -_MAX_LOG_ERROR), _MAX_LOG_ERROR)
        self._machine += _LEARNING_RATE * error
        self._own[name, degree] += _LEARNING_RATE * error
        self._mean_deviation += _LEARNING_RATE * (abs(error) - self._mean_deviation)

    def decay(self, seconds: float) -> None:
        """Forget part of the corrections after `seconds` without a batch.

        Without this, a machine that was slow once could refuse every request, run no batch, and
        so never learn that it is fast again.
        """
        factor = math.exp(-seconds / _DECAY_S)
        self._machine *= factor
        self._own = {point: factor * own for point, own in self._own.items()}

    def _interpolate(self, point: ModelDegree, images: int) -> float:
        sizes, seconds = self._sizes[point], self._seconds[point]
        right = bisect_left(sizes, images)
        if right == len(sizes):
            # Above the largest measured size, time grows in proportion to the number of images.
            return seconds[-1] * images / sizes[-1]
        if sizes[right] == images or right == 0:
            return seconds[right]
        left = right - 1
        share = (images - sizes[left]) / (sizes[right] - sizes[left])
        return seconds[left] + share * (seconds[right] - seconds[left])


def measure_costs(
    run: Callable[[str, int, int], float],
    names: Sequence[str],
    degrees: Sequence[int],
    *,
    max_batch: int,
    within_s: float,
    repeats: int = 3,
) -> CostModel:
    """Time batches of 1, 2, 4, ... images of every model at every degree.

    Args:
        run: Runs a batch (model name, degree, number of images) and returns its seconds.
        names: Names of the models.
        degrees: Degrees of the dial.
        max_batch: Largest number of images in a batch.
        within_s: No larger batch is tried once a batch takes longer than these seconds.
        repeats: Number of timed runs of each batch; the median counts.
    """
    measured: dict[ModelDegree, dict[int, float]] = {}
    for name in names:
        for degree in degrees:
            by_size = measured.setdefault((name, degree), {})
            images = 1
            while True:
                run(name, degree, images)  # warm-up: the first run allocates memory
                times = sorted(run(name, degree, images) for _ in range(repeats))
                by_size[images] = times[repeats // 2]
                if images == max_batch or by_size[images] > within_s:
                    break
                images = min(2 * images, max_batch)
    return CostModel(measured)


def _valid(seconds: Mapping[int, float]) -> bool:
    return bool(seconds) and all(size > 0 and time > 0 for size, time in seconds.items())


def _running_maximum(values: Sequence[float]) -> list[float]:
    return [max(values[: number + 1]) for number in range(len(values))]
