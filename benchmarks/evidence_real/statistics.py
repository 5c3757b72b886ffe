"""Scores with intervals: bootstrap over images and seeds, paired where models share images."""

from collections.abc import Callable, Sequence

import numpy as np

from tokendial.measure import Interval, Resampling, percentile_interval

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Score of logits [N, classes] (or per-image values [N]) with labels [N]."""


def resampled_scores(
    draws: Resampling, metric: Metric, by_seed: Sequence[np.ndarray], labels: np.ndarray
) -> np.ndarray:
    """Mean score over seeds: first of all images and seeds, then of each draw.

    Args:
        draws: The draws of images and of seeds.
        metric: The score.
        by_seed: For each seed the logits (or values) of all test images.
        labels: Labels of the test images.

    Returns:
        [1 + number of draws].
    """
    found = [np.mean([metric(outputs, labels) for outputs in by_seed])]
    for seeds, images in ((some.tolist(), chosen.numpy()) for some, chosen in draws):
        drawn = labels[images]
        of_seed = {seed: metric(by_seed[seed][images], drawn) for seed in set(seeds)}
        found.append(np.mean([of_seed[seed] for seed in seeds]))
    return np.array(found)


def interval(found: np.ndarray) -> Interval:
    """The first score, with the 95 % interval of the others."""
    return percentile_interval(found[0], found[1:].tolist())


def mean(values: np.ndarray, _labels: np.ndarray) -> float:
    """Mean of one value for each image, without NaN."""
    return float(np.nanmean(values))


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
