"""The one clock of the library: times settings in rounds in which all of them take turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
Prepared = TypeVar("Prepared")

DISTURBED_SPREAD = 0.2
"""Spread (see `Timing`) above which a time is unreliable. On an idle machine it is below 0.1."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one setting, measured in turns with the other settings."""

    seconds: float
    """Time of one run in seconds: the median over all rounds."""
    spread: float
    """Difference between third and first quartile of the times, as a fraction of their median."""
    times: tuple[float, ...]
    """Seconds of each counted round. All settings took turns in a round, so ratios of two settings
    are best taken within rounds."""

    @property
    def low(self) -> float:
        """10th percentile of the times."""
        return percentiles(self.times, 10)[0]

    @property
    def high(self) -> float:
        """90th percentile of the times."""
        return percentiles(self.times, 90)[0]

    @property
    def disturbed(self) -> bool:
        """Whether the times vary so much that another program probably used the machine."""
        return self.spread > DISTURBED_SPREAD


def time_in_rounds(
    settings: Sequence[T],
    prepare: Callable[[T], Prepared],
    run: Callable[[Prepared], object],
    *,
    device: torch.device,
    seconds: float = 1.0,
    least_rounds: int = 5,
    most_rounds: int = 100,
    warm_up: int = 1,
) -> list[Timing]:
    """Time the same work under several settings, each of them once in each round.

    Something that slows the machine down for a while slows all settings of these rounds, so it does
    not change their ratios. Therefore the time of a setting is the median of the first setting,
    times the median of the ratio to the first setting within a round. Each setting in turn begins a
    round, because the first one finds other caches than the last.

    Args:
        settings: The settings to compare, at least one.
        prepare: Switches to a setting, and returns what `run` gets. This is not timed.
        run: Does the work. It is timed until the device has finished.
        device: The device that does the work.
        seconds: Time in seconds to spend on each setting, unless `least_rounds` take longer.
        least_rounds: Smallest number of counted rounds. With one round the spread is 0.
        most_rounds: Largest number of counted rounds.
        warm_up: First rounds, in which kernels are chosen and caches filled; they are not counted.

    Returns:
        One timing for each setting, in their order.

    Example:
        >>> import torch
        >>> sizes = time_in_rounds(
        ...     [64, 128], torch.randn, torch.sort, device=torch.device("cpu"), seconds=0.0
        ... )
        >>> len(sizes)
        2
    """
    rounds: list[list[float]] = []
    order = list(range(len(settings)))
    begin = time.perf_counter()
    while len(rounds) < warm_up + least_rounds or (
        len(rounds) < warm_up + most_rounds
        and time.perf_counter() - begin < seconds * len(settings)
    ):
        times = [0.0] * len(settings)
        first = len(rounds) % len(settings)
        for place in order[first:] + order[:first]:
            times[place] = _seconds(run, prepare(settings[place]), device)
        rounds.append(times)
    columns = list(zip(*rounds[warm_up:], strict=True))
    firsts = columns[0]
    first_median = statistics.median(firsts)
    return [
        Timing(
            first_median
            * statistics.median(own / other for own, other in zip(column, firsts, strict=True)),
            _spread(column),
            column,
        )
        for column in columns
    ]


def percentiles(values: Sequence[float], *which: int) -> list[float]:
    """Percentiles of at least one value, interpolated between values.

    Args:
        values: The values, in any order.
        which: Percentiles from 1 to 99.
    """
    if len(values) == 1:
        return [values[0]] * len(which)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in which]


def _seconds(run: Callable[[Prepared], object], prepared: Prepared, device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()  # work that was queued before is not part of the run
    start = time.perf_counter()
    run(prepared)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _spread(times: Sequence[float]) -> float:
    low, middle, high = percentiles(times, 25, 50, 75)
    return (high - low) / middle
