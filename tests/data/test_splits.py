"""The warning about classes that have no samples to train on or to validate on."""

import pytest
from torch.utils.data import Subset

from tokendial.data import Splits
from tokendial.data.sets.labelled_images import ImageFiles
from tokendial.data.splits import warn_of_absent_classes


def files(*labels):
    return ImageFiles([(None, label) for label in labels])


@pytest.mark.parametrize(
    ("train", "val", "lines"),
    [
        (files(0, 1, 2), files(2, 1, 0, 0), []),
        (
            files(0, 1, 2),
            files(1, 1),
            ["2 of 3 classes ('a', 'c') have no samples to validate on: scores"],
        ),
        (
            files(0, 2),
            files(0, 1, 2),
            ["1 of 3 classes ('b') has no samples to train on: the model never"],
        ),
        (
            files(0, 1, 2),
            Subset(files(0, 1, 2), [0, 1]),
            ["1 of 3 classes ('c') has no samples to validate on"],
        ),
    ],
)
def test_classes_without_samples_are_logged(caplog, train, val, lines):
    warn_of_absent_classes(Splits(train=train, val=val, classes=("a", "b", "c")))
    assert len(caplog.messages) == len(lines)
    assert all(part in line for part, line in zip(lines, caplog.messages, strict=True))


def test_sets_without_known_labels_are_skipped(caplog):
    warn_of_absent_classes(Splits(train=[], val=Subset([], []), classes=("a", "b")))
    assert caplog.messages == []
