"""Classes without samples to train on or to validate on, and balanced class weights."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import Subset

from tokendial.data import Splits
from tokendial.data.sets.labelled_images import ImageFiles
from tokendial.data.splits import balanced_weights, few_per_class, warn_of_absent_classes


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


def splits(train, **kind):
    return Splits(train=train, val=files(), classes=("a", "b", "c"), **kind)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5], [5, 3, 2, 0]])
def test_balanced_weights_are_those_of_scikit_learn(indices):
    labels = np.array([0, 0, 1, 2, 2, 2])
    train = Subset(files(*labels.tolist()), indices)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels[indices])
    assert balanced_weights(splits(train)) == pytest.approx(tuple(wanted))


@pytest.mark.parametrize(
    ("train", "kind", "message"),
    [
        (files(0, 2, 2), {}, "training images of each class, but 'b' has none"),
        ([], {}, "labels are known before all of it is read; give the 3 weights as numbers"),
        (files(0, 1, 2), {"multi_label": True}, "data with one label per image"),
        (files(0, 1, 2), {"dense": True}, "data with one label per image"),
    ],
)
def test_balanced_weights_need_labels_of_every_class(train, kind, message):
    with pytest.raises(ValueError, match=f"train.class_weights=balanced .*{message}"):
        balanced_weights(splits(train, **kind))


def test_a_few_samples_of_each_class_are_drawn_and_more_include_them():
    labels = [0] * 40 + [1] * 20 + [2] * 3
    drawn = [few_per_class(splits(files(*labels)), count, seed=5) for count in (2, 8)]
    few, more = ([labels[i] for i in each.train.indices] for each in drawn)
    assert few == [0, 0, 1, 1, 2, 2]
    assert more == [0] * 8 + [1] * 8 + [2] * 3
    assert set(drawn[0].train.indices) < set(drawn[1].train.indices)
    other = few_per_class(splits(files(*labels)), 2, seed=6)
    assert other.train.indices != drawn[0].train.indices
    subset = splits(Subset(files(*labels), list(range(35, 63))))
    assert [label for _, label in few_per_class(subset, 1, seed=0).train.dataset.dataset.files]
    assert len(few_per_class(subset, 1, seed=0).train) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (splits(files(0), multi_label=True), "one label per image"),
        (splits([]), "labels are known before all of it is read"),
    ],
)
def test_few_samples_need_labels_that_are_known(data, message):
    with pytest.raises(ValueError, match=f"train.images_per_class=4 needs data .*{message}"):
        few_per_class(data, 4, seed=0)
