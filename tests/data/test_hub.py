import builtins
import io

import datasets
import numpy as np
import pytest
from PIL import Image

from tokendial.data import HuggingFace, ImageError

NAMES = ["cat", "dog", "rocket"]


def table(pieces, labels, kind=None):
    features = datasets.Features(
        image=datasets.Image(), label=kind or datasets.ClassLabel(names=NAMES)
    )
    images = []
    for piece in pieces:
        buffer = io.BytesIO()
        Image.fromarray(piece).save(buffer, "png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture
def splits(pieces):
    return datasets.DatasetDict(
        train=table(pieces[:3], [2, 0, 1]), validation=table(pieces[3:5], [0, 2])
    )


@pytest.fixture
def saved(tmp_path):
    def save(found):
        found.save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save


def test_a_saved_set_gives_images_labels_and_names(splits, saved, pieces):
    found = HuggingFace(path=saved(splits)).build(0)
    assert [label for _, label in found.train] == [2, 0, 1]
    assert [label for _, label in found.val] == [0, 2]
    assert found.classes == tuple(NAMES)
    for number in range(3):
        np.testing.assert_array_equal(np.asarray(found.train[number][0]), pieces[number])


def test_splits_and_columns_have_any_names(pieces, saved):
    part = table(pieces[:2], [5, 0], datasets.Value("int32"))
    part = part.rename_columns({"image": "picture", "label": "kind"})
    path = saved(datasets.DatasetDict(a=part, b=part))
    found = HuggingFace(path=path, train="a", val="b", image="picture", label="kind").build(0)
    assert [label for _, label in found.val] == [5, 0]
    assert found.classes == tuple(f"class {number}" for number in range(6))


@pytest.fixture
def on_hub(monkeypatch):
    """Replace the hub by a given data set or error; return the list of requests."""
    asked = []

    def answer(found):
        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


def test_images_outside_the_table_are_read_and_named(splits, on_hub, tmp_path, pieces):
    Image.fromarray(pieces[9]).save(tmp_path / "a.png")
    rows = {"image": [str(tmp_path / "a.png"), str(tmp_path / "b.png")], "label": [0, 1]}
    splits["train"] = datasets.Dataset.from_dict(rows, features=splits["train"].features)
    on_hub(splits)
    train = HuggingFace(path="someone/pets").build(0).train
    np.testing.assert_array_equal(np.asarray(train[0][0]), pieces[9])
    with pytest.raises(ImageError, match="no such image: .*b.png"):
        train[1]


def test_a_set_of_the_hub_is_opened_by_name(splits, on_hub):
    asked = on_hub(splits)
    found = HuggingFace(path="someone/pets", subset="small", revision="1234abc").build(0)
    assert asked == [(("someone/pets", "small"), {"revision": "1234abc"})]
    assert len(found.train) == 3


def test_a_set_that_cannot_be_fetched_is_named_in_one_line(on_hub):
    on_hub(ConnectionError("no way\nto the hub"))
    with pytest.raises(ValueError, match=r"data.path: someone/pets cannot be opened \(no way\)\.$"):
        HuggingFace(path="someone/pets").build(0)


def test_an_empty_split_is_refused(splits, saved, on_hub):
    splits["validation"] = splits["validation"].select([])
    on_hub(splits)
    with pytest.raises(ValueError, match="a split of someone/pets holds no images"):
        HuggingFace(path="someone/pets").build(0)
    with pytest.raises(ValueError, match="data.path: .* cannot be opened"):
        HuggingFace(path=saved(splits)).build(0)


def test_a_folder_of_another_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.path: .* cannot be opened \("):
        HuggingFace(path=str(tmp_path)).build(0)


def test_a_set_without_splits_is_refused(splits, saved):
    path = saved(splits["train"])
    with pytest.raises(ValueError, match="must hold splits, as a DatasetDict does, got a Dataset"):
        HuggingFace(path=path).build(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": "test"}, "data.val: .* has no split 'test'; it has train, validation"),
        ({"image": "img"}, "data.image: .* has no column 'img'; it has image, label"),
        ({"label": "y"}, "data.label: .* has no column 'y'; it has image, label"),
        ({"image": "label"}, "data.image: column 'label' of .* must hold images, got ClassLabel"),
    ],
)
def test_the_error_for_a_missing_name_lists_the_names(splits, saved, settings, message):
    with pytest.raises(ValueError, match=message):
        HuggingFace(path=saved(splits), **settings).build(0)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, -1], None, r"data.label: labels of .* must lie in \[0, 2\], got -1"),
        ([0, None], None, "must hold one whole number for each image, got ClassLabel"),
        (["a", "b"], datasets.Value("string"), "must hold one whole number for .*, got Value"),
    ],
)
def test_labels_that_cannot_be_used_are_named(splits, saved, pieces, labels, kind, message):
    splits["validation"] = table(pieces[: len(labels)], labels, kind)
    with pytest.raises(ValueError, match=message):
        HuggingFace(path=saved(splits)).build(0)


def test_an_unreadable_image_is_named_by_its_row(splits, saved):
    rows = {"image": [{"bytes": b"no picture", "path": None}], "label": [0]}
    splits["train"] = datasets.Dataset.from_dict(rows, features=splits["train"].features)
    path = saved(splits)
    with pytest.raises(ImageError, match=r"saved, row 0 is not an image"):
        HuggingFace(path=path).build(0).train[0]


def test_the_error_without_the_library_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r"data.name hf needs: pip install 'tokendial\[hf\]'"):
        HuggingFace(path=str(tmp_path)).build(0)


def test_classes_that_differ_between_splits_are_refused(splits, saved, pieces):
    other = datasets.ClassLabel(names=["dog", "cat", "rocket"])
    splits["validation"] = table(pieces[3:5], [0, 2], other)
    with pytest.raises(ValueError, match="same order, got cat, dog, rocket and dog, cat, rocket"):
        HuggingFace(path=saved(splits)).build(0)
