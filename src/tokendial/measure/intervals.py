"""Confidence intervals of scores by the bootstrap: over images, and over training runs.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile
intervals). The interval says how much a score could differ if other images of the same kind (and
other seeds) had been drawn.
"""

# Shape legend: R training runs, N images.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendial.checks import check_count


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and its confidence interval."""

    value: float
    """The score of all images."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def bootstrap_interval(
    score: Callable[..., Tensor],
    *samples: Tensor,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compute a score of images and its percentile bootstrap interval.

    Each resample draws as many images as there are, with replacement. All samples are drawn at the
    same images, so a difference of two scores is paired.

    Args:
        score: Gets the drawn part of each sample, in their shapes, and returns one number.
        samples: Values of the images, such as whether each was classified rightly: [N], or [R, N]
            for several training runs with the same images. Then runs are drawn with replacement,
            too.
        level: Probability that the interval is to cover, in (0, 1).
        resamples: Number of resamples.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are no samples, they are empty or differ in shape, or `level` or
            `resamples` is out of range.

    Example:
        >>> before, after = torch.tensor([1.0, 1, 0, 1, 0, 1]), torch.tensor([1.0, 1, 1, 1, 1, 1])
        >>> gain = bootstrap_interval(lambda a, b: (b - a).mean(), before, after)
        >>> round(gain.value, 3), gain.low >= 0.0
        (0.333, True)
    """
    _check(samples, level, resamples)
    shape = samples[0].shape
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randint(size, (size,), generator=generator)

    values = []
    for _ in range(resamples):
        drawn = samples
        if len(shape) == 2:
            runs = draw(shape[0])
            drawn = tuple(sample[runs] for sample in drawn)
        images = draw(shape[-1])
        values.append(float(score(*(sample[..., images] for sample in drawn))))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return Interval(float(score(*samples)), low, high)


def _check(samples: tuple[Tensor, ...], level: float, resamples: int) -> None:
    if not samples:
        raise ValueError("samples must be at least one tensor, got none.")
    shape = samples[0].shape
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"samples must have shape [N] or [R, N], none 0, got {list(shape)}.")
    if other := [list(sample.shape) for sample in samples if sample.shape != shape]:
        raise ValueError(f"samples must all have shape {list(shape)}, got {other[0]}.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level}.")
    check_count("resamples", resamples)
