import pytest

from tokendial.data import ImageNet

FILES = [
    "train/n01440764/n01440764_10026.jpg",
    "train/n01443537/n01443537_10007.jpg",
    "train/n01443537/n01443537_10014.jpg",
    "val/n01443537/ILSVRC2012_val_00000236.jpg",
]


@pytest.fixture
def root(save):
    folder = save(FILES)
    (folder / "names.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 great white shark\n"
    )
    return folder


def build(root, **settings):
    return ImageNet(**{"root": str(root), "check": False} | settings).build(0)


def test_classes_are_numbered_by_wordnet_id(root, shows):
    splits = build(root)
    assert splits.classes == ("n01440764", "n01443537")
    assert [label for _, label in splits.train] == [0, 1, 1]
    image, label = splits.val[0]
    assert shows(image, 3)
    assert label == 1


def test_a_file_names_the_classes(root):
    splits = build(root, classes=str(root / "names.txt"))
    assert splits.classes == ("tench, Tinca tinca", "goldfish")


def test_a_part_of_the_set_needs_check_false(root):
    with pytest.raises(ValueError, match=r"classes in .*train must be 1,000, got 2; data.check=fa"):
        build(root, check=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("n01440764 tench", r"data.classes: .*names.txt has no name for n01443537"),
        ("n01440764", r"names.txt, line 1: must be an id and a name, got 'n01440764'"),
        (None, r"no such file: .*names.txt. data.classes may also be null"),
    ],
)
def test_errors_in_the_file_of_names_name_the_line(root, names, message):
    path = root / "names.txt"
    path.unlink() if names is None else path.write_text(names)
    with pytest.raises(ValueError, match=message):
        build(root, classes=str(path))


def test_the_error_for_unsorted_validation_images_says_to_sort_them(save):
    root = save(["train/n01440764/1.jpg", "val/ILSVRC2012_val_00000236.jpg"])
    with pytest.raises(ValueError, match=r"val has no class folders. ImageNet-1k.*are sorted"):
        build(root)


def test_a_missing_folder_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"no such folder: .*nowhere/train. ImageNet-1k, https://image-"
    ):
        build(tmp_path / "nowhere")
