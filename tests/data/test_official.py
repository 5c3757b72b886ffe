"""What sets with an official test set share, shown on the smallest of them."""

import pytest

from tokendial.data import Food101
from tokendial.data.splits import hold_out


@pytest.fixture
def food(save):
    names = [f"{dish}/{number}" for dish in ("pho", "soup") for number in range(12)]
    root = save(f"images/{name}.jpg" for name in names)
    (root / "meta").mkdir()
    train = [name for name in names if int(name.split("/")[1]) < 10]
    for split, lines in (
        ("classes", ["pho", "soup"]),
        ("train", train),
        ("test", [name for name in names if name not in train]),
    ):
        (root / "meta" / f"{split}.txt").write_text("\n".join(lines))
    return str(root)


def test_a_share_of_each_class_is_hold_out():
    labels = [0] * 30 + [1] * 10 + [2]
    kept, held = hold_out(labels, 0.1, seed=0)
    assert [labels[index] for index in held] == [0, 0, 0, 1]
    assert sorted(kept + held) == list(range(41))
    assert kept == sorted(kept)


def test_held_out_images_depend_on_the_seed_only():
    labels = [0] * 50
    assert hold_out(labels, 0.2, seed=1) == hold_out(labels, 0.2, seed=1)
    assert hold_out(labels, 0.2, seed=1) != hold_out(labels, 0.2, seed=2)


def test_nothing_is_held_out_by_default():
    assert hold_out([1, 0, 1], 0.0, seed=0) == ([0, 1, 2], [])


def test_training_is_the_same_whatever_is_validated_on(food):
    choose, final = (
        Food101(root=food, val=val, holdout=0.2, check=False).build(5) for val in ("val", "test")
    )
    assert choose.train.indices == final.train.indices
    assert (len(choose.train), len(choose.val), len(final.val)) == (16, 4, 4)
    assert not set(choose.train.indices) & set(choose.val.indices)
    assert [label for _, label in choose.val] == [0, 0, 1, 1]
    assert final.val.files != choose.val.dataset.files


@pytest.mark.parametrize("holdout", [0.0, 0.01])
def test_validating_on_held_out_images_needs_a_holdout(food, holdout):
    with pytest.raises(ValueError, match=f"at least one image for data.val=val, got {holdout}"):
        Food101(root=food, val="val", holdout=holdout, check=False).build(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": "train"}, "val must be one of val, test, got 'train'"),
        ({"holdout": 1.0}, r"holdout must lie in \[0, 1\), got 1.0"),
        ({"holdout": float("nan")}, r"holdout must lie in \[0, 1\), got nan"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Food101(root="food", **settings)
