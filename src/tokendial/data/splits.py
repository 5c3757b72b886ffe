"""The result of opening a data set: a training set, a validation set and the classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, Subset

_MAX_NAMED_CLASSES = 5
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Splits:
    """The training set, the validation set and the classes of a data set."""

    train: Dataset[tuple[Any, Any]]
    """Samples to train on: pairs of a PIL image (RGB) or a `Video` and a target. The target is a
    class index, float32 [classes] of 0 and 1 (`multi_label`), or a mask (`dense`)."""
    val: Dataset[tuple[Any, Any]]
    """Samples to validate on, in the same form as `train`."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the model's logits. Binary masks have a single one."""
    multi_label: bool = False
    """Whether a sample can have any number of classes at once."""
    dense: bool = False
    """Whether targets are masks of the image's size, [H, W] uint8: class indices, or 0 and 1 if
    there is a single class; 255 marks ignored pixels."""
    video: bool = False
    """Whether samples are videos (`tokendial.data.Video`) instead of images."""


@runtime_checkable
class HasLabels(Protocol):
    """A data set that knows the classes of its samples without reading them."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Class indices in the order of the samples."""


def hold_out(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split sample indices at random, class by class, into (kept, held out); both are sorted.

    Args:
        labels: Class index of each sample.
        share: Fraction of each class that is held out. At least one sample of a class is kept.
        seed: Seed of the random draw.
    """
    rng = np.random.default_rng(seed)
    label_array = np.asarray(labels)
    held: list[int] = []
    for label in np.unique(label_array):
        of_class = rng.permutation(np.flatnonzero(label_array == label))
        held += of_class[: min(round(share * len(of_class)), len(of_class) - 1)].tolist()
    kept = np.setdiff1d(np.arange(len(label_array)), held)
    return kept.tolist(), sorted(held)


def few_per_class(splits: Splits, count: int, seed: int) -> Splits:
    """The same splits with a few random training samples of each class, for few-shot learning.

    A seed draws nested sets: 4 of each class are among its 8.

    Args:
        splits: The splits.
        count: Samples of each class, at least 1. Classes with fewer keep all.
        seed: Seed of the random draw.

    Raises:
        ValueError: If samples do not have one label each, or the labels are not known without
            reading all samples.
    """
    labels = _single_labels(splits, f"train.images_per_class={count}")
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == n))[:count] for n in np.unique(labels)]
    return replace(splits, train=Subset(splits.train, np.sort(np.concatenate(drawn)).tolist()))


def balanced_weights(splits: Splits) -> tuple[float, ...]:
    """Return the weight N / (C n) of each class with n of the N training samples, for C classes.

    Raises:
        ValueError: If samples do not have one label each, the labels are not known without reading
            all samples, or a class has no training sample.
    """
    field = "train.class_weights=balanced"
    weights = f"; give the {len(splits.classes)} weights as numbers"
    labels = _single_labels(splits, field, otherwise=weights)
    counts = np.bincount(labels, minlength=len(splits.classes))
    if not counts.all():
        absent = splits.classes[int(counts.argmin())]
        raise ValueError(f"{field} needs training images of each class, but {absent!r} has none.")
    found: list[float] = (len(labels) / (len(counts) * counts)).tolist()
    return tuple(found)


def warn_of_absent_classes(splits: Splits) -> None:
    """Log, one line each, which classes have no sample to train on and none to validate on.

    A model cannot learn the former; scores say nothing about the latter. Nothing is logged for
    multi-label sets, masks, and sets whose labels are not known without reading all samples.
    """
    if splits.multi_label or splits.dense:
        return
    for part, verb, consequence in (
        (splits.train, "train", "the model never learns such classes"),
        (splits.val, "validate", "scores say nothing about such classes"),
    ):
        labels = _labels(part)
        if labels is None:
            continue
        absent = np.setdiff1d(np.arange(len(splits.classes)), labels)
        if absent.size:
            names = ", ".join(repr(splits.classes[n]) for n in absent[:_MAX_NAMED_CLASSES])
            more = ", ..." if absent.size > _MAX_NAMED_CLASSES else ""
            which = f"{absent.size:,} of {len(splits.classes):,} classes ({names}{more})"
            has = "has" if absent.size == 1 else "have"
            _LOG.warning("%s %s no samples to %s on: %s", which, has, verb, consequence)


def _single_labels(splits: Splits, field: str, otherwise: str = "") -> np.ndarray:
    """The class of each training sample; a ValueError about a field if there is no such thing."""
    if splits.multi_label or splits.dense:
        raise ValueError(f"{field} needs data with one label per image.")
    labels = _labels(splits.train)
    if labels is None:
        raise ValueError(
            f"{field} needs data whose labels are known before all of it is read{otherwise}."
        )
    return labels


def _labels(part: Dataset[tuple[Any, Any]]) -> np.ndarray | None:
    if isinstance(part, Subset):
        all_labels = _labels(part.dataset)
        return None if all_labels is None else all_labels[np.asarray(part.indices, dtype=np.int64)]
    return np.asarray(part.labels) if isinstance(part, HasLabels) else None
