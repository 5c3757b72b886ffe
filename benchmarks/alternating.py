"""What benchmarks compare by the library's clock: functions that take turns, and their ratios.

When other programs slow the machine down, they slow all functions of that round alike. So the
median of the ratios within rounds is more reliable than the ratio of two medians.
"""

import resource
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from tokendial.measure.timing import percentiles, time_in_rounds

Key = TypeVar("Key", bound=Hashable)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Runner:
    """A function to time."""

    call: Callable[[], object]
    """Does one pass."""
    prepare: Callable[[], object] = _nothing
    """Called before each turn, without being timed, for example to set the degree."""
    seen: bool = True
    """Whether torch allocates the memory of a pass in this thread, so that its peak is measured."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one runner, in one round."""

    seconds: float
    """Seconds of the pass."""
    page_faults: int
    """Minor page faults in the pass: pages that the operating system had to provide again."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and percentiles of repeated measurements."""

    median: float
    """Median."""
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute median and percentiles, interpolated between values."""
        low, median, high = percentiles(values, 10, 50, 90)
        return cls(median, low, high)

    def as_row(self, key: str) -> dict[str, float]:
        """Entries KEY, KEY_low and KEY_high of a row."""
        return {key: self.median, f"{key}_low": self.low, f"{key}_high": self.high}


def alternate(
    runners: Mapping[Key, Runner],
    *,
    repeats: int,
    device: str = "cpu",
    warm_up: int = 2,
    seconds_per_round: float = 0.1,
) -> dict[Key, list[Turn]]:
    """Time all runners in rounds. Each runner has one turn per round.

    Args:
        runners: The runners. Rounds begin with each of them in turn.
        repeats: Number of rounds, without the warm-up, if passes are not short.
        device: Device of the runners. It is synchronised before the clock is read.
        warm_up: Passes of each runner before the first round.
        seconds_per_round: Seconds that a turn should take: if passes are shorter, there are more
            rounds, at most 100 times as many.

    Returns:
        The turns of each runner. Turns with the same index belong to the same round.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    faults: dict[Key, list[int]] = {key: [] for key in runners}

    def prepare(key: Key) -> Key:
        runners[key].prepare()
        return key

    def call(key: Key) -> None:
        before = _minor_faults()
        runners[key].call()
        faults[key].append(_minor_faults() - before)

    timings = time_in_rounds(
        list(runners),
        prepare,
        call,
        device=torch.device(device),
        seconds=repeats * seconds_per_round,
        least_rounds=repeats,
        most_rounds=100 * repeats,
        warm_up=warm_up,
    )
    return {
        key: [Turn(*both) for both in zip(timing.times, faults[key][warm_up:], strict=True)]
        for key, timing in zip(runners, timings, strict=True)
    }


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def ratio(base: Sequence[Turn], own: Sequence[Turn]) -> Spread:
    """How many times as fast `own` is as `base`: the spread of the ratios within rounds."""
    return Spread.of([b.seconds / o.seconds for b, o in zip(base, own, strict=True)])


def seconds(turns: Sequence[Turn]) -> float:
    """Median time of a pass."""
    return Spread.of([turn.seconds for turn in turns]).median


def page_faults(turns: Sequence[Turn]) -> float:
    """Median number of page faults in a pass."""
    return Spread.of([turn.page_faults for turn in turns]).median
