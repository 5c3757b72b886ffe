import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tokendial.data import ImageError, WebDataset
from tokendial.data.sets.shards import find_shards


def encoded(piece, kind):
    buffer = io.BytesIO()
    Image.fromarray(piece).save(buffer, kind)
    return buffer.getvalue()


def write(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def root(tmp_path, pieces):
    """Two shards to train on and one to validate on; six images, the i-th of class i % 3."""

    def sample(number, kind="jpeg"):
        # A second name with a mask and metadata, as WebDataset's shards often have.
        key = f"part/{number:04d}"
        return [
            (f"{key}.cls", str(number % 3).encode() + b"\n"),
            (f"{key}.{'jpg' if kind == 'jpeg' else kind}", encoded(pieces[number], kind)),
            (f"{key}.seg.png", b"a mask"),
            (f"{key}.json", b"{}"),
        ]

    write(tmp_path / "train-00.tar", [("__meta__.json", b"{}"), *sample(0), *sample(1, "png")])
    write(tmp_path / "train-01.tar", [*sample(2), *sample(3, "webp")])
    write(tmp_path / "val.tar", [*sample(4), *sample(5), ("part/._0005.jpg", b"of a desktop")])
    return tmp_path


def build(root, **settings):
    patterns = {"train": f"{root}/train-{{00..01}}.tar", "val": f"{root}/val.tar"}
    return WebDataset(**patterns | {"classes": 3} | settings).build(0)


def test_samples_come_in_the_order_of_the_shards(root, shows):
    splits = build(root)
    assert [label for _, label in splits.train] == [0, 1, 2, 0]
    assert all(shows(image, number) for number, (image, _) in enumerate(splits.train))
    assert [label for _, label in splits.val] == [1, 2]
    assert splits.classes == ("class 0", "class 1", "class 2")
    assert build(root, classes=["a", "b", "c"]).classes == ("a", "b", "c")


def test_samples_are_read_in_any_order(root, shows):
    train = build(root).train
    for number in (3, 0, 3, 1):
        assert shows(train[number][0], number)


def test_a_saved_index_gives_the_same_samples_without_indexing_again(root, monkeypatch):
    first = build(root).train
    assert {path.name for path in root.glob("*.npz")} == {
        "train-00.tar.index.npz",
        "train-01.tar.index.npz",
        "val.tar.index.npz",
    }
    monkeypatch.setattr("tokendial.data.sets.shards.index_shard", None)
    again = build(root).train
    for (image, label), (other, other_label) in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))
        assert label == other_label


def test_a_changed_shard_is_read_again(root, pieces):
    build(root)
    write(root / "val.tar", [("a.png", encoded(pieces[7], "png")), ("a.cls", b"0")])
    assert [label for _, label in build(root).val] == [0]


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 cut"])
def test_a_damaged_index_is_made_again(root, content):
    build(root)
    (root / "val.tar.index.npz").write_bytes(content)
    assert [label for _, label in build(root).val] == [1, 2]


def test_no_index_is_saved_if_disabled_or_impossible(root, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    build(root, index=False)
    monkeypatch.setattr("tokendial.data.sets.shards.atomic_write", refuse)
    assert len(build(root).train) == 4
    assert not list(root.glob("*.npz"))


def test_patterns_count_list_and_match(tmp_path):
    for name in ("a-008", "a-009", "a-010", "b-x"):
        (tmp_path / f"{name}.tar").write_bytes(b"")

    def names(pattern):
        return [path.stem for path in find_shards(f"{tmp_path}/{pattern}.tar", "data.train")]

    assert names("a-{008..010}") == ["a-008", "a-009", "a-010"]
    assert names("{b-x,a-009}") == ["b-x", "a-009"]
    assert names("{a,b}-*") == ["a-008", "a-009", "a-010", "b-x"]
    assert names("a-0[01]?") == ["a-008", "a-009", "a-010"]
    assert names("a-{0}0{8..9}") == ["a-008", "a-009"]
    with pytest.raises(ValueError, match=r"data.train: no such shard: .*a-011.tar"):
        names("a-{009..011}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", b"x")], r"val.tar, sample a has no .cls file"),
        ([("a.cls", b"1")], r"val.tar, sample a has no image"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], r"val.tar, sample a has two images"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"val.tar, a.cls: label must be a whole number in"),
        ([("b/a.jpg", b"x"), ("b/a.cls", b"3")], r"sample b/a: label must lie in \[0, 2\], got 3"),
        ([], r"val.tar holds no images"),
    ],
    ids=["label", "image", "two", "word", "range", "empty"],
)
def test_samples_that_are_wrong_are_named(root, files, message):
    write(root / "val.tar", files)
    with pytest.raises(ValueError, match=message):
        build(root)


def test_compressed_and_cut_shards_are_refused(root):
    path = root / "val.tar"
    whole = path.read_bytes()
    for content in (whole[:1500], whole[:2000], whole[:4096], b"no tar file at all" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"val.tar is not a whole, uncompressed tar file"):
            build(root)
    write(path, [("a.jpg", b"x"), ("a.cls", b"1")], mode="w:gz")
    with pytest.raises(ValueError, match=r"val.tar is not a whole, uncompressed tar file"):
        build(root)


def test_an_unreadable_image_is_named_when_it_is_read(root):
    write(
        root / "val.tar",
        [("a.jpg", b"no picture"), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1")],
    )
    val = build(root).val
    with pytest.raises(ImageError, match=r"val.tar, sample a is not an image"):
        val[0]
    with pytest.raises(ImageError, match=r"val.tar, sample b is empty"):
        val[1]


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        WebDataset(train="a.tar", val="b.tar", classes=1)
