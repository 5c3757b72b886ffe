import pytest
from PIL import Image

from tokendial.data import ImageFolder


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def test_classes_are_numbered_by_name_and_files_listed(tmp_path):
    write(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/deep/2.jpg", "val/dog/3.png")
    splits = ImageFolder(root=str(tmp_path)).build(0)
    assert splits.classes == ("cat", "dog")
    assert [splits.train[i][1] for i in range(len(splits.train))] == [0, 0, 1]
    image, target = splits.val[0]
    assert (image.size, target, splits.multi_label) == ((4, 4), 1, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "data.root: no such folder"),
        (["training/a/1.png"], "has no folder 'train'; it has training"),
        (["train/1.png"], "has no class folders"),
        (["train/a/1.png"], "has no folder 'val'; it has train"),
        (["train/a/1.png", "val/b/1.png"], "class 'b' of .*val is not in .*train"),
    ],
)
def test_a_layout_that_is_wrong_says_where(tmp_path, files, message):
    root = tmp_path / "data"
    write(root, *files)
    with pytest.raises(ValueError, match=message):
        ImageFolder(root=str(root)).build(0)


def test_an_empty_class_folder_is_named(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(ValueError, match="class folder .*b holds no images"):
        ImageFolder(root=str(tmp_path)).build(0)
