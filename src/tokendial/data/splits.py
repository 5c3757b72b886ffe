"""What every data set gives: a training set, a validation set and the classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, Subset

_SHOWN = 5
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Splits:
    """A data set, ready to be transformed and batched."""

    train: Dataset[tuple[Any, Any]]
    """Pairs of a PIL image (RGB) or a video and a target: a class index, float32 [classes] of 0 and
    1, or, for dense tasks, a mask of the image's size."""
    val: Dataset[tuple[Any, Any]]
    """The same, to evaluate on."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the model's logits; for binary masks a single one."""
    multi_label: bool = False
    """Whether any number of classes can be right at once."""
    dense: bool = False
    """Whether targets are masks: [H, W] uint8, of class indices, or with a single class of 0 and 1,
    and 255 where nothing is asked."""
    video: bool = False
    """Whether these are videos: a `Video` in place of each image."""


@runtime_checkable
class HasLabels(Protocol):
    """A data set that knows the class of each sample without reading it."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Indices of classes, in the order of the samples."""


def warn_of_absent_classes(splits: Splits) -> None:
    """Log in one line each which classes have no sample to train on, or to validate on.

    A model never learns the former; scores say nothing about the latter. Sets with several labels
    for a sample, masks, and sets that have to be read to know their labels are passed over.
    """
    if splits.multi_label or splits.dense:
        return
    for part, verb, so in (
        (splits.train, "train", "such classes are never learnt"),
        (splits.val, "validate", "scores say nothing about such classes"),
    ):
        labels = _labels(part)
        if labels is None:
            continue
        absent = np.setdiff1d(np.arange(len(splits.classes)), labels)
        if absent.size:
            names = ", ".join(repr(splits.classes[number]) for number in absent[:_SHOWN])
            more = ", ..." if absent.size > _SHOWN else ""
            which = f"{absent.size:,} of {len(splits.classes):,} classes ({names}{more})"
            _LOG.warning("there is nothing to %s on of %s: %s", verb, which, so)


def _labels(part: Dataset[tuple[Any, Any]]) -> np.ndarray | None:
    if isinstance(part, Subset):
        of_all = _labels(part.dataset)
        return None if of_all is None else of_all[np.asarray(part.indices, dtype=np.int64)]
    return np.asarray(part.labels) if isinstance(part, HasLabels) else None
