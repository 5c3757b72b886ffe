"""Timing in rounds: all compared functions run once per round, and ratios are taken per round.

When other programs slow the machine down, they slow all functions of that round alike. So the
median of the ratios within rounds is more reliable than the ratio of two medians.
"""

import math
import resource
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

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
    """Seconds of one pass: the mean if the turn consisted of several passes."""
    page_faults: float
    """Minor page faults in one pass: pages that the operating system had to provide again."""


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
        low, median, high = (float(v) for v in np.percentile(values, [10, 50, 90]))
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
    shortest_turn_s: float = 0.1,
) -> dict[Key, list[Turn]]:
    """Time all runners in `repeats` rounds. Each runner has one turn per round.

    Args:
        runners: The runners. Rounds begin with each of them in turn.
        repeats: Number of rounds, without the warm-up.
        device: Device of the runners. It is synchronised before the clock is read.
        warm_up: Passes of each runner before the first round.
        shortest_turn_s: Seconds that a turn should take at least: short passes are repeated within
            a turn, as often as the last pass of the warm-up suggests. 0 makes each turn one pass.

    Returns:
        The turns of each runner. Turns with the same index belong to the same round.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    passes = dict.fromkeys(runners, 1)
    for key, runner in runners.items():
        runner.prepare()
        for _ in range(warm_up):
            duration = _turn(runner, 1, device).seconds
            passes[key] = max(1, math.ceil(shortest_turn_s / duration))
    turns: dict[Key, list[Turn]] = {key: [] for key in runners}
    order = list(runners)
    for repeat in range(repeats):
        first = repeat % len(order)
        for key in order[first:] + order[:first]:
            runners[key].prepare()
            turns[key].append(_turn(runners[key], passes[key], device))
    return turns


def _turn(runner: Runner, passes: int, device: str) -> Turn:
    _synchronize(device)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(passes):
        runner.call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Turn(seconds / passes, faults / passes)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def ratio(base: Sequence[Turn], own: Sequence[Turn]) -> Spread:
    """How many times as fast `own` is as `base`: the spread of the ratios within rounds."""
    return Spread.of([b.seconds / o.seconds for b, o in zip(base, own, strict=True)])


def seconds(turns: Sequence[Turn]) -> float:
    """Median time of a pass."""
    return Spread.of([turn.seconds for turn in turns]).median


def page_faults(turns: Sequence[Turn]) -> float:
    """Median number of page faults in a pass."""
    return Spread.of([turn.page_faults for turn in turns]).median
