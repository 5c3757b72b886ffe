import numpy as np
import pytest
from layouts import CIFAR_NAMES, flat, pickled, python2_pickle, write_cifar100

from tokendial.data import CIFAR100


@pytest.fixture
def root(tmp_path, pieces):
    return write_cifar100(tmp_path, pieces, train=[99, 0, 7], test=[5, 99])


def build(root, **settings):
    return CIFAR100(**{"root": str(root), "check": False} | settings).build(0)


def test_pickles_of_both_pythons_give_images_and_labels(root, pieces):
    splits = build(root)
    assert [label for _, label in splits.train] == [99, 0, 7]
    assert [label for _, label in splits.val] == [5, 99]
    assert splits.classes == tuple(CIFAR_NAMES)
    for number in range(3):
        np.testing.assert_array_equal(np.asarray(splits.train[number][0]), pieces[number])
    np.testing.assert_array_equal(np.asarray(splits.val[1][0]), pieces[4])


def test_the_folder_itself_may_be_named(root):
    assert len(build(root / "cifar-100-python").train) == 3


def test_a_share_of_the_training_set_is_held_out(root, pieces):
    path = root / "cifar-100-python" / "train"
    path.write_bytes(python2_pickle(flat(pieces[:20]), [0, 1] * 10))
    splits = build(root, val="val", holdout=0.1)
    assert sorted(label for _, label in splits.val) == [0, 1]
    assert (len(splits.train), len(splits.val)) == (18, 2)


class Evil:
    def __reduce__(self):
        return print, ("this program must not run",)


def test_a_pickle_that_would_run_a_program_is_refused(root, capsys):
    path = root / "cifar-100-python" / "meta"
    path.write_bytes(pickled({"fine_label_names": Evil()}))
    with pytest.raises(ValueError, match=r"meta is not a file of CIFAR-100 \(it asks for builtins"):
        build(root)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train is not a file of CIFAR-100"),
        (b"plain text", "train is not a file of CIFAR-100"),
        (pickled([1]), "train is not a file of CIFAR-100"),
        (pickled({}), r"train must hold data, uint8 \[images, 3072\]"),
        (
            pickled({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}),
            "and as many fine_labels",
        ),
        (
            pickled({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [100]}),
            r"train: fine_labels must lie in \[0, 99\], got 100",
        ),
        (
            pickled({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}),
            "images in .*train must be 50,000, got 0",
        ),
    ],
    ids=["empty", "text", "list", "nothing", "short", "label", "none"],
)
def test_a_damaged_file_is_named(root, content, message):
    (root / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        build(root)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_named(root):
    path = root / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="train is not a file of CIFAR-100"):
        build(root)


def test_a_part_of_the_set_needs_check_false(root):
    with pytest.raises(ValueError, match=r"train must be 50,000, got 3; data.check=false accepts"):
        build(root, check=True)


def test_other_classes_are_refused(root):
    (root / "cifar-100-python" / "meta").write_bytes(pickled({"fine_label_names": CIFAR_NAMES[1:]}))
    with pytest.raises(ValueError, match="meta must name 100 fine labels"):
        build(root)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*meta. CIFAR-100's python version, http"):
        build(tmp_path)
