"""The last minute, second by second: latencies, the dial, the load, and the accuracy to expect."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tokendial.serve.http.schemas import Live, Second
from tokendial.serve.scheduling.engine import Engine

_HISTORY_S = 60
_LATEST_S = 10
"""Seconds over which the present percentiles are taken."""


@dataclass
class _Bin:
    """What was answered within a second."""

    latencies_s: list[float] = field(default_factory=list)
    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By model and degree."""
    loop_lag_s: float = 0.0
    """The longest time that the event loop was late."""


class LastMinute:
    """Told of every answer, and once a second that a second has gone; belongs to one thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._bins = deque([_Bin()], maxlen=_HISTORY_S)
        self._seconds: deque[Second] = deque(maxlen=_HISTORY_S)  # their t: when they ended

    def answered(self, name: str, degree: int, seconds: float) -> None:
        """An image was answered, so long after it had arrived."""
        self._bins[-1].latencies_s.append(seconds)
        self._bins[-1].images[name, degree] += 1

    def looped(self, late_s: float) -> None:
        """The event loop came round, so much later than it should."""
        self._bins[-1].loop_lag_s = max(self._bins[-1].loop_lag_s, late_s)

    @property
    def loop_lag_s(self) -> float:
        """The longest time in the last minute that the event loop was late, in seconds."""
        return max(each.loop_lag_s for each in self._bins)

    def tick(self) -> None:
        """A second has gone."""
        status = self._engine.status()
        self._seconds.append(
            Second(
                t=self._clock(),
                degree=status.degree,
                load=status.arrivals_per_s,
                p99_ms=_percentile_ms(self._bins[-1].latencies_s, 0.99),
                queued=status.queued,
                loop_lag_ms=1000 * self._bins[-1].loop_lag_s,
            )
        )
        self._bins.append(_Bin())

    def told(self, slo_ms: float, refused: dict[str, int]) -> Live:
        """What goes on, and what went on."""
        now, status = self._clock(), self._engine.status()
        latest = [s for each in list(self._bins)[-_LATEST_S:] for s in each.latencies_s]
        return Live(
            now=time.time(),
            degree=status.degree,
            queued=status.queued,
            arrivals_per_s=status.arrivals_per_s,
            # Where the objective is below what one image takes, every load is too much.
            utilisation=min(status.utilisation, 1e6),
            answered=status.answered,
            refused=refused,
            p50_ms=_percentile_ms(latest, 0.5),
            p99_ms=_percentile_ms(latest, 0.99),
            slo_ms=slo_ms,
            history=[past.model_copy(update={"t": past.t - now}) for past in self._seconds],
        )

    def accuracy(self, name: str, of: Callable[[str, int], float | None]) -> float:
        """Mean over the images of a model in the last minute; NaN: none, or it is not known."""
        images: Counter[int] = Counter()
        for each in self._bins:
            for (model, degree), count in each.images.items():
                if model == name:
                    images[degree] += count
        known = {degree: of(name, degree) for degree in images}
        if not images or None in known.values():
            return math.nan
        right = sum(count * (known[degree] or 0.0) for degree, count in images.items())
        return right / images.total()


def _percentile_ms(seconds: list[float], share: float) -> float | None:
    """The smallest that so large a share of them does not exceed; None if there are none."""
    if not seconds:
        return None
    return 1000 * sorted(seconds)[math.ceil(share * len(seconds)) - 1]
