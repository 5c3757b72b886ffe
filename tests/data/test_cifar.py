import pickle
import struct

import numpy as np
import pytest

from tokendial.data import CIFAR100

NAMES = [f"thing {number}" for number in range(100)]


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A mapping as Python 2 pickled it with protocol 2, opcode by opcode: texts are bytes."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += text(b"b") + b"tR(" + number(1)
    array += b"(" + b"".join(map(number, pixels.shape)) + b"t"
    array += dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + listed + b"u."


def pickled(value: object) -> bytes:
    # Later protocols have another form of arrays, in which the set was never published.
    return pickle.dumps(value, protocol=4)


def flat(pieces):
    """[N, 3072]: all of red, all of green, all of blue."""
    return np.ascontiguousarray(pieces.transpose(0, 3, 1, 2).reshape(len(pieces), -1))


@pytest.fixture
def root(tmp_path, pieces):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(python2_pickle(flat(pieces[:3]), [99, 0, 7]))
    (folder / "test").write_bytes(pickled({"data": flat(pieces[3:5]), "fine_labels": [5, 99]}))
    (folder / "meta").write_bytes(pickled({"fine_label_names": NAMES}))
    return tmp_path


def build(root, **settings):
    return CIFAR100(**{"root": str(root), "check": False} | settings).build(0)


def test_pickles_of_both_pythons_give_images_and_labels(root, pieces):
    splits = build(root)
    assert [label for _, label in splits.train] == [99, 0, 7]
    assert [label for _, label in splits.val] == [5, 99]
    assert splits.classes == tuple(NAMES)
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


def test_parts_of_the_set_are_refused_unless_asked_for(root):
    with pytest.raises(ValueError, match=r"train must be 50,000, got 3; data.check=false takes"):
        build(root, check=True)


def test_other_classes_are_refused(root):
    (root / "cifar-100-python" / "meta").write_bytes(pickled({"fine_label_names": NAMES[1:]}))
    with pytest.raises(ValueError, match="meta must name 100 fine labels"):
        build(root)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*meta. CIFAR-100's python version, http"):
        build(tmp_path)
