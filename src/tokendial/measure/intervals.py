"""Confidence intervals of scores by the bootstrap: over images, and over training runs.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile
intervals). The interval says how much a score could differ if other images of the same kind (and
other seeds) had been drawn.
"""

# Shape legend: R training runs, N images.

from collections.abc import Callable, Iterator, Sequence
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

    def percent(self, *, sign: bool = False) -> str:
        """The score and its interval in percent, such as "85.1 (82.0, 87.9)".

        Args:
            sign: Whether positive numbers get a plus sign, as differences do.
        """
        plus = "+" if sign else ""
        value, low, high = (100 * number for number in (self.value, self.low, self.high))
        return f"{value:{plus}.1f} ({low:{plus}.1f}, {high:{plus}.1f})"


class Resampling:
    """Random draws, with replacement, of images and of training runs.

    Iterating gives, for each resample, the indices of the drawn runs and of the drawn images, both
    int64. Scores that were computed from the same `Resampling` belong to the same draws, so their
    differences are paired: these vary less than each of the scores.
    """

    def __init__(
        self,
        num_images: int,
        num_runs: int = 1,
        *,
        groups: Sequence[str] | None = None,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        """Draw the runs and the images of each resample.

        Args:
            num_images: Number of images.
            num_runs: Number of training runs that were tested on these images.
            groups: For each image, the name of what it shares with others, such as the object that
                it shows. Whole groups are drawn then, because images of one object are no
                independent evidence. None: each image is drawn alone.
            resamples: Number of resamples.
            seed: Seed of the draws.

        Raises:
            ValueError: If a number is not a positive integer, or `groups` has another length.
        """
        check_count("num_images", num_images)
        check_count("num_runs", num_runs)
        check_count("resamples", resamples)
        if groups is not None and len(groups) != num_images:
            raise ValueError(f"groups must name {num_images} images, got {len(groups)}.")
        generator = torch.Generator().manual_seed(seed)
        members: dict[str, list[int]] = {}
        for image in range(num_images):
            name = str(image) if groups is None else groups[image]
            members.setdefault(name, []).append(image)
        by_group = [torch.tensor(images) for images in members.values()]

        def draw(size: int) -> Tensor:
            return torch.randint(size, (size,), generator=generator)

        self._draws: list[tuple[Tensor, Tensor]] = []
        for _ in range(resamples):
            runs, drawn = draw(num_runs), draw(len(by_group))
            images = drawn if groups is None else torch.cat([by_group[number] for number in drawn])
            self._draws.append((runs, images))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The drawn runs and the drawn images of each resample."""
        return iter(self._draws)


def percentile_interval(value: float, resampled: Sequence[float], level: float = 0.95) -> Interval:
    """The interval between two percentiles of a score's values in resamples.

    Args:
        value: The score of all images.
        resampled: The score in each resample. Resamples where it is not defined (NaN) are left out.
        level: Probability that the interval is to cover, in (0, 1).

    Raises:
        ValueError: If `level` is out of range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level}.")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(resampled, dtype=torch.float64).nanquantile(tails).tolist()
    return Interval(float(value), low, high)


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
    _check(samples)
    shape = samples[0].shape
    num_runs = shape[0] if len(shape) == 2 else 1
    draws = Resampling(shape[-1], num_runs, resamples=resamples, seed=seed)
    values = []
    for runs, images in draws:
        of_runs = samples if len(shape) == 1 else tuple(sample[runs] for sample in samples)
        values.append(float(score(*(sample[..., images] for sample in of_runs))))
    return percentile_interval(float(score(*samples)), values, level)


def mean_difference(first: Tensor, second: Tensor) -> Interval:
    """Mean of `first` minus that of `second`, paired by image; see `bootstrap_interval`."""
    return bootstrap_interval(lambda a, b: (a - b).mean(), first, second)


def _check(samples: tuple[Tensor, ...]) -> None:
    if not samples:
        raise ValueError("samples must be at least one tensor, got none.")
    shape = samples[0].shape
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"samples must have shape [N] or [R, N], none 0, got {list(shape)}.")
    if other := [list(sample.shape) for sample in samples if sample.shape != shape]:
        raise ValueError(f"samples must all have shape {list(shape)}, got {other[0]}.")
