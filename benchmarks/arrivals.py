"""When requests arrive: traces of load, each a pure function of its numbers and a seed.

A trace is an array of ascending times, in seconds from its start. Rates are requests per second.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
Rates = Callable[[Times], Times]
"""Function that returns the requests per second at given times."""


def steady(*, rate: float, seconds: float) -> Times:
    """One request every 1 / `rate` seconds."""
    _check(rate=rate, seconds=seconds)
    return np.arange(int(np.ceil(rate * seconds))) / rate


def poisson(*, rate: float, seconds: float, seed: int) -> Times:
    """Poisson arrivals at a constant rate."""
    _check(rate=rate, seconds=seconds)
    return _thin(lambda times: np.full_like(times, rate), rate, seconds, seed)


def step(*, low: float, high: float, seconds: float, at: float, until: float, seed: int) -> Times:
    """Poisson arrivals at the rate `low`, and at `high` from `at` until `until`."""
    _check(low=low, high=high, seconds=seconds)
    if not 0 <= at <= until <= seconds:
        raise ValueError(f"0 <= at <= until <= seconds, got {at}, {until} and {seconds}")

    def rates(times: Times) -> Times:
        return np.where((times >= at) & (times < until), high, low)

    return _thin(rates, max(low, high), seconds, seed)


def bursts(
    *, low: float, high: float, seconds: float, lasting: float, apart: float, seed: int
) -> Times:
    """Poisson arrivals at the rate `low`, with bursts at the rate `high`.

    Args:
        low: Rate between bursts.
        high: Rate within a burst.
        seconds: Length of the trace. It starts between two bursts.
        lasting: Mean length of a burst, in seconds; lengths are exponential.
        apart: Mean time from the end of a burst to the next one; exponential, too.
        seed: Seed of the bursts and the arrivals.
    """
    _check(low=low, high=high, seconds=seconds, lasting=lasting, apart=apart)
    draw = np.random.default_rng([seed, 1])  # not the stream that draws the arrivals
    turns: list[float] = []  # a burst begins at the even ones, and ends at the odd ones
    while not turns or turns[-1] < seconds:
        mean = lasting if len(turns) % 2 else apart
        turns.append((turns[-1] if turns else 0.0) + draw.exponential(mean))

    def rates(times: Times) -> Times:
        return np.where(np.searchsorted(turns, times, side="right") % 2, high, low)

    return _thin(rates, max(low, high), seconds, seed)


def diurnal(*, low: float, high: float, seconds: float, period: float, seed: int) -> Times:
    """Poisson arrivals whose rate goes from `low` to `high` and back in each `period` seconds."""
    _check(low=low, high=high, seconds=seconds, period=period)

    def rates(times: Times) -> Times:
        return low + (high - low) * (1 - np.cos(2 * np.pi * times / period)) / 2

    return _thin(rates, max(low, high), seconds, seed)


def read_trace(path: str | Path, *, speed: float = 1.0) -> Times:
    """Read arrivals from a file with one time per line, in seconds from any origin.

    Lines may stand in any order. Empty lines and lines that start with # are skipped.

    Args:
        path: Path of the file.
        speed: Factor on the speed of the trace; 2 plays it in half of its time.
    """
    _check(speed=speed)
    times = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        try:
            times.append(float(text))
        except ValueError:
            times.append(np.nan)
        if not np.isfinite(times[-1]):
            raise ValueError(f"{path}, line {number}: {text!r} is no number of seconds")
    if not times:
        raise ValueError(f"{path} holds no times")
    ascending: Times = np.sort(np.array(times))
    ascending -= ascending[0]
    return ascending / speed


def per_second(times: Times, seconds: float) -> Times:
    """Number of arrivals in each second of a trace; the last second may be incomplete."""
    edges = np.arange(int(np.ceil(seconds)) + 1)
    return np.histogram(times, bins=edges)[0].astype(np.float64)


def _thin(rates: Rates, most: float, seconds: float, seed: int) -> Times:
    """Poisson arrivals at a changing rate: arrivals at the highest rate, each kept at random.

    Lewis & Shedler, "Simulation of nonhomogeneous Poisson processes by thinning", 1979.
    """
    draw = np.random.default_rng(seed)
    count = draw.poisson(most * seconds)
    times: Times = np.sort(draw.uniform(0, seconds, count))
    return times[draw.uniform(0, most, count) < rates(times)]


def _check(**numbers: float) -> None:
    """Raise a ValueError unless rates and lengths are above 0; the lower rate may be 0."""
    for name, number in numbers.items():
        if not (number > 0 or (name == "low" and number == 0)) or not np.isfinite(number):
            raise ValueError(f"{name} must be above 0, got {number}")
