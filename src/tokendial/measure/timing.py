"""One clock for everything that is compared: rounds in which all settings take turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

DISTURBED = 0.2
"""Quartile spread above which a time is not to be trusted. An idle machine stays below a tenth."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one setting takes, measured in turns with others."""

    seconds: float
    """Time of one run: the median over all rounds."""
    spread: float
    """Distance between the quartiles of the times, as a fraction of their median."""

    @property
    def disturbed(self) -> bool:
        """Whether the times differ so much that something else must have used the machine."""
        return self.spread > DISTURBED


def time_in_rounds(
    settings: Sequence[T],
    prepare: Callable[[T], object],
    run: Callable[[], object],
    *,
    device: torch.device,
    seconds: float = 1.0,
    least_rounds: int = 5,
    most_rounds: int = 100,
) -> list[Timing]:
    """Time the same work under several settings, all of them once in each round.

    Whatever slows the machine down for a while slows all settings of those rounds alike, so it
    cannot change their ratios: each time is the first setting's median, times the median of the
    ratios to the first setting within a round. A first round chooses kernels and fills caches; it
    is not counted.

    Args:
        settings: What is compared, at least one.
        prepare: Switches to a setting; not timed.
        run: The work; timed until the device has finished it.
        device: Where the work is done.
        seconds: Time to spend on each setting, unless `least_rounds` take longer.
        least_rounds: Rounds that are counted at least; with one, the spread is not known and 0.
        most_rounds: Rounds that are counted at most.

    Returns:
        One timing for each setting, in their order.

    Example:
        >>> import torch
        >>> sizes = time_in_rounds(
        ...     [64, 128], lambda n: None, lambda: None, device=torch.device("cpu"), seconds=0.0
        ... )
        >>> len(sizes)
        2
    """
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) <= least_rounds or (
        len(rounds) <= most_rounds and time.perf_counter() - begin < seconds * len(settings)
    ):
        times = []
        for setting in settings:
            prepare(setting)
            times.append(_seconds(run, device))
        rounds.append(times)
    del rounds[0]
    columns = list(zip(*rounds, strict=True))
    firsts = columns[0]
    first = statistics.median(firsts)
    return [
        Timing(
            first
            * statistics.median(own / other for own, other in zip(column, firsts, strict=True)),
            _spread(column),
        )
        for column in columns
    ]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()  # what was queued before is not part of the run
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _spread(times: Sequence[float]) -> float:
    if len(times) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
