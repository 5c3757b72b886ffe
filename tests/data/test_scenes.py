import gzip

import numpy as np
import pytest

from tokendial.data import Scenes
from tokendial.data.sets.scenes import BAG, SNEAKER


def splits(task, **kwargs):
    return Scenes(task=task, train_size=40, val_size=20, **kwargs).build(3)


@pytest.mark.parametrize("task", ["present", "count", "where", "which"])
def test_a_scene_is_the_same_each_time_it_is_read(task):
    first, again = splits(task).train, splits(task).train
    for number in (7, 0, 7):
        image, target = again[number]
        assert np.array_equal(np.asarray(image), np.asarray(first[number][0]))
        assert np.array_equal(target, first[number][1])


def test_scenes_differ_from_each_other_between_sets_and_seeds():
    config = Scenes(train_size=2, val_size=2)
    one, other = config.build(0), config.build(1)
    shown = [one.train[0], one.train[1], one.val[0], other.train[0]]
    assert len({np.asarray(image).tobytes() for image, _ in shown}) == 4


def test_present_lists_the_kinds_in_the_scene():
    scenes = splits("present")
    assert scenes.multi_label
    for number in range(20):
        kinds = scenes.train.layout(number)
        assert len(kinds) == 9
        assert set(np.flatnonzero(scenes.train[number][1])) == set(kinds)


def test_count_is_the_number_of_sneakers_and_takes_every_value():
    scenes = splits("count")
    targets = [scenes.train[number][1] for number in range(40)]
    assert targets == [int((scenes.train.layout(i) == SNEAKER).sum()) for i in range(40)]
    assert set(targets) == set(range(5))


def test_where_is_the_cell_of_the_only_bag():
    scenes = splits("where")
    for number in range(20):
        assert np.flatnonzero(scenes.train.layout(number) == BAG).tolist() == [
            scenes.train[number][1]
        ]


def test_which_is_the_only_kind_that_is_there_three_times():
    scenes = splits("which")
    for number in range(20):
        counts = np.bincount(scenes.train.layout(number), minlength=10)
        assert counts[scenes.train[number][1]] == 3
        assert sorted(counts)[-2] == 1


def test_the_target_of_a_single_item_is_its_kind():
    scenes = splits("which", cells=1, img_size=24)
    image, target = scenes.train[0]
    assert image.size == (24, 24)
    assert [target] == scenes.train.layout(0).tolist()


def test_training_and_validation_share_no_item():
    scenes = splits("count")
    train = {item.tobytes() for item in scenes.train.sprites[1]}
    assert len(train) == 2000
    assert not train & {item.tobytes() for item in scenes.val.sprites[1]}


def test_the_last_training_items_of_fashion_mnist_are_held_out(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6000, 28, 28)), np.arange(6000) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        data = gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(data)
    scenes = splits("count", items=str(tmp_path))
    assert (len(scenes.train.item_kinds), len(scenes.val.item_kinds)) == (1000, 5000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "colour"}, "task must be one of present, count, where, which, got 'colour'"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"cells": 2}, "cells must be 3, or 1 with the task which, got 2"),
        ({"cells": 1}, "cells must be 3, or 1 with the task which, got 1"),
        ({"task": "which", "cells": 1, "img_size": 16}, r"img_size must lie in \[18, 160\]"),
        ({"img_size": 32}, r"img_size must lie in \[48, 160\] with 3 cells a side, got 32"),
    ],
)
def test_impossible_scenes_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**settings)


def test_missing_items_say_where_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="Debian's package dataset-fashion-mnist"):
        Scenes(items=str(tmp_path)).build(0)


LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 3])
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (b"plain text", "images.* is missing or unreadable"),
        (gzip.compress(IMAGES)[:-12], "images.* is missing or unreadable"),
        (gzip.compress(IMAGES)[:10] + b"\xff" * 40, "images.* is missing or unreadable"),
        (gzip.compress(b""), "images.* is not an IDX file"),
        (gzip.compress(IMAGES[:-1]), "images.* is not an IDX file"),
        (gzip.compress(IMAGES), r"all ten kinds .* images \(2, 28, 28\), labels \(2,\)"),
        (gzip.compress(LABELS), r"28x28 items, .* images \(2,\), labels \(2,\)"),
    ],
    ids=["text", "cut", "damaged", "empty", "short", "few", "flat"],
)
def test_item_files_that_cannot_be_used_are_named(tmp_path, images, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    with pytest.raises(ValueError, match=message) as caught:
        Scenes(items=str(tmp_path)).build(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [18, 24, 160])
def test_a_single_item_fits_into_every_allowed_size(size):
    scenes = splits("which", cells=1, img_size=size).train
    assert {scenes[number][0].size for number in range(20)} == {(size, size)}


def test_a_scene_that_is_not_there_raises():
    with pytest.raises(IndexError):
        splits("count").train[40]
