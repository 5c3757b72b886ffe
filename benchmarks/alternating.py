"""Timing: everything that is compared takes turns, and ratios are taken within a turn.

A machine that does other things slows all that run in one turn alike, so the ratio of two times of
the same turn says more than the ratio of two medians.
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
    """Something that is timed."""

    call: Callable[[], object]
    """One pass."""
    prepare: Callable[[], object] = _nothing
    """Called before each turn, and not timed: turns the dial, for one."""
    seen: bool = True
    """Whether torch allocates its memory in this thread, so that its peak can be seen."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one runner."""

    seconds: float
    """Of one pass; the mean, where several are needed for a turn that can be timed."""
    page_faults: float
    """Minor ones in one pass: pages that the operating system had to hand out again."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A number that was measured several times."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and percentiles, interpolated between values."""
        low, median, high = (float(v) for v in np.percentile(values, [10, 50, 90]))
        return cls(median, low, high)

    def as_row(self, key: str) -> dict[str, float]:
        """As entries KEY, KEY_low and KEY_high."""
        return {key: self.median, f"{key}_low": self.low, f"{key}_high": self.high}


def alternate(
    runners: Mapping[Key, Runner],
    *,
    repeats: int,
    device: str = "cpu",
    warm_up: int = 2,
    shortest_turn_s: float = 0.1,
) -> dict[Key, list[Turn]]:
    """Let every runner take `repeats` turns, one after another.

    Args:
        runners: Each starts a round as often as the others, give or take one.
        repeats: Rounds that count.
        device: What they run on; waited for before the clock is read.
        warm_up: Passes of each before the first round.
        shortest_turn_s: A turn repeats a pass until it takes about this long, judged by the last
            pass of the warm-up. 0: each turn is one pass.

    Returns:
        The turns of each runner; those with the same index were taken in the same round.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    passes = dict.fromkeys(runners, 1)
    for key, runner in runners.items():
        runner.prepare()
        for _ in range(warm_up):
            took = _turn(runner, 1, device).seconds
            passes[key] = max(1, math.ceil(shortest_turn_s / took))
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
    """How many times as fast `own` is as `base`: of the ratios within each turn."""
    return Spread.of([b.seconds / o.seconds for b, o in zip(base, own, strict=True)])


def seconds(turns: Sequence[Turn]) -> float:
    """Median time of a pass."""
    return Spread.of([turn.seconds for turn in turns]).median


def page_faults(turns: Sequence[Turn]) -> float:
    """Median number in a pass."""
    return Spread.of([turn.page_faults for turn in turns]).median
