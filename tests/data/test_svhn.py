import builtins

import numpy as np
import pytest
from layouts import write_svhn
from scipy.io import savemat

from tokendial.data import SVHN


@pytest.fixture
def root(tmp_path, pieces):
    write_svhn(tmp_path, "train", pieces[:3], [10, 1, 9])
    write_svhn(tmp_path, "test", pieces[3:5], [2, 10])
    write_svhn(tmp_path, "extra", pieces[5:7], [8, 7])
    return tmp_path


def build(root, **settings):
    return SVHN(**{"root": str(root), "check": False} | settings).build(0)


def test_images_and_labels_of_the_published_files(root, pieces):
    splits = build(root)
    assert [label for _, label in splits.train] == [0, 1, 9]
    assert [label for _, label in splits.val] == [2, 0]
    assert splits.classes == tuple("0123456789")
    for number in range(3):
        np.testing.assert_array_equal(np.asarray(splits.train[number][0]), pieces[number])


def test_extra_images_follow_those_of_training(root, pieces):
    train = build(root, extra=True).train
    assert [label for _, label in train] == [0, 1, 9, 8, 7]
    np.testing.assert_array_equal(np.asarray(train[4][0]), pieces[6])


def test_wrong_labels_and_shapes_are_named(root, pieces):
    write_svhn(root, "test", pieces[3:5], [0, 1])
    with pytest.raises(ValueError, match=r"test_32x32.mat: y must lie in \[1, 10\], got 0"):
        build(root)
    write_svhn(root, "test", pieces[3:6], [1, 2])
    with pytest.raises(ValueError, match=r"got uint8 \[32, 32, 3, 3\] and 2"):
        build(root)
    savemat(root / "test_32x32.mat", {"X": 1})
    with pytest.raises(ValueError, match="test_32x32.mat has no variable 'y'"):
        build(root)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_cut_file_is_named(root, share):
    path = root / "train_32x32.mat"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="train_32x32.mat is not a readable MATLAB file") as caught:
        build(root)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_named(root):
    (root / "train_32x32.mat").write_bytes(b"no MATLAB file, but long enough for a header" * 9)
    with pytest.raises(ValueError, match="train_32x32.mat is not a readable MATLAB file"):
        build(root)


def test_a_part_of_the_set_needs_check_false(root):
    with pytest.raises(ValueError, match=r"train_32x32.mat must be 73,257, got 3; data.check=fals"):
        build(root, check=True)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*train_32x32.mat. SVHN's format 2, http"):
        build(tmp_path)


def test_the_error_without_scipy_says_how_to_install_it(root, monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ValueError, match=r"needs scipy: pip install 'tokendial\[matlab\]'"):
        build(root)
