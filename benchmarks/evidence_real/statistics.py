"""Scores with intervals: bootstrap over images and seeds, paired where models share images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Score of logits [N, classes] (or per-image values [N]) with labels [N]."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the 95 % interval of its bootstrap replicates."""

    value: float
    low: float
    high: float

    def percent(self, *, sign: bool = False) -> str:
        """The value and its interval in percent, such as "85.1 (82.0, 87.9)"."""
        plus = "+" if sign else ""
        value, low, high = (100 * number for number in (self.value, self.low, self.high))
        return f"{value:{plus}.1f} ({low:{plus}.1f}, {high:{plus}.1f})"


class Resampling:
    """Random draws, with replacement, of test images and of seeds.

    Two scores that the same `Resampling` computed belong to the same draws. Their difference is a
    paired comparison: it varies less than each of the two.
    """

    def __init__(
        self,
        num_images: int,
        num_seeds: int,
        *,
        groups: Sequence[str] | None = None,
        replicates: int = 1000,
        seed: int = 0,
    ) -> None:
        """Draw the images and seeds of each replicate.

        Args:
            num_images: Images in the test set.
            num_seeds: Seeds that models were trained with; 1 if nothing was trained.
            groups: For each image, what it shares with others, such as the object that it shows.
                Whole groups are drawn then, because images of one object are no independent
                evidence. None: each image is drawn alone.
            replicates: Number of draws.
            seed: Seed of the draws.
        """
        rng = np.random.default_rng(seed)
        names = np.arange(num_images) if groups is None else np.asarray(groups)
        members = [np.flatnonzero(names == name) for name in np.unique(names)]
        drawn = rng.integers(len(members), size=(replicates, len(members)))
        self.images = [np.concatenate([members[group] for group in row]) for row in drawn]
        self.seeds = rng.integers(num_seeds, size=(replicates, num_seeds))

    def scores(
        self, metric: Metric, by_seed: Sequence[np.ndarray], labels: np.ndarray
    ) -> np.ndarray:
        """Mean score over seeds: first of all images and seeds, then of each draw.

        Args:
            metric: The score.
            by_seed: For each seed the logits (or values) of all test images.
            labels: Labels of the test images.

        Returns:
            [1 + replicates].
        """
        scores = [np.mean([metric(outputs, labels) for outputs in by_seed])]
        for images, seeds in zip(self.images, self.seeds, strict=True):
            drawn = labels[images]
            of_seed = {s: metric(by_seed[s][images], drawn) for s in set(seeds.tolist())}
            scores.append(np.mean([of_seed[seed] for seed in seeds.tolist()]))
        return np.array(scores)


def interval(scores: np.ndarray) -> Interval:
    """The first score, and the 2.5 % and 97.5 % quantiles of the others, without NaN."""
    low, high = np.nanquantile(scores[1:], (0.025, 0.975))
    return Interval(float(scores[0]), float(low), float(high))


def mean(values: np.ndarray, _labels: np.ndarray) -> float:
    """Mean of one value for each image."""
    return float(values.mean())


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images whose largest logit is that of their class."""
    return float((logits.argmax(1) == labels).mean())


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean, over the classes that occur, of the fraction of their images that are recognised."""
    hits = np.bincount(labels, weights=logits.argmax(1) == labels, minlength=logits.shape[1])
    images = np.bincount(labels, minlength=logits.shape[1])
    return float((hits[images > 0] / images[images > 0]).mean())


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; with more than two classes the mean of one class against the rest.

    For two classes the score of an image is the difference of its logits, for more it is the
    probability of the class. Classes without images, or with all of them, are left out.
    """
    if logits.shape[1] == 2:
        return _binary_auroc(logits[:, 1] - logits[:, 0], labels == 1)
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponential / exponential.sum(1, keepdims=True)
    areas = [
        _binary_auroc(probabilities[:, number], labels == number) for number in np.unique(labels)
    ]
    return float(np.nanmean(areas))


def _binary_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Fraction of pairs (positive, negative) in the right order; ties count half."""
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not len(negatives) or not len(positives):
        return float("nan")
    below = np.searchsorted(negatives, positives, "left")
    at_most = np.searchsorted(negatives, positives, "right")
    return float((below + at_most).mean() / 2 / len(negatives))
