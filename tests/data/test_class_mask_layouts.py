"""Data sets with masks of classes in the layouts that they are published in."""

import numpy as np
import pytest
from PIL import Image

from tokendial.data import Pairs
from tokendial.data.check import check_pairs
from tokendial.data.sets.class_mask_layouts import class_mask_pairs
from tokendial.open_vocabulary import CLASS_LISTS, class_list

# Image and mask of one validation pair below the root, by data set.
FILES = {
    "voc": ("JPEGImages/a_1.jpg", "SegmentationClass/a_1.png"),
    "context": ("JPEGImages/a_1.jpg", "SegmentationClassContext/a_1.png"),
    "coco_object": ("images/val2017/1.jpg", "annotations/val2017/1_instanceTrainIds.png"),
    "coco_stuff": ("images/val2017/1.jpg", "annotations/val2017/1_labelTrainIds.png"),
    "cityscapes": (
        "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png",
        "gtFine/val/ulm/ulm_1_gtFine_labelTrainIds.png",
    ),
    "ade20k": ("images/validation/1.jpg", "annotations/validation/1.png"),
}
LISTS = {
    "voc": "ImageSets/Segmentation/val.txt",
    "context": "ImageSets/SegmentationContext/val.txt",
}


def kind(name):
    return name.rstrip("0123456789") if name.startswith(("voc", "context")) else name


def write_pair(root, name, mask):
    image_path, mask_path = (root / file for file in FILES[kind(name)])
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", mask.shape[::-1]).save(image_path)
    Image.fromarray(mask).save(mask_path)
    if kind(name) in LISTS:
        path = root / LISTS[kind(name)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{image_path.stem}\n")
        # A pair of another list, and an image of none.
        Image.new("RGB", mask.shape[::-1]).save(image_path.with_stem("b"))
    # The other masks that these data sets have beside those that count.
    if kind(name) in ("coco_object", "coco_stuff", "cityscapes"):
        Image.fromarray(mask).save(mask_path.with_name("other.png"))


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_the_validation_pairs_are_found_in_the_published_layout(name, tmp_path):
    """Catches: folders, suffixes or lists of another data set; an ignored value that counts."""
    classes = len(class_list(name))
    no_background = name in ("voc20", "context59", "ade20k")
    mask = np.full((4, 6), 255, np.uint8)
    mask[0], mask[1] = 0, classes - 1 + no_background
    write_pair(tmp_path, name, mask)
    pairs = class_mask_pairs(name, str(tmp_path))
    assert pairs.num_classes == classes
    found = pairs.val_set()
    assert len(found) == 1
    _, read = found[0]
    assert (read[0] == (255 if no_background else 0)).all()
    assert (read[1] == classes - 1).all()
    assert (read[2:] == 255).all()


def test_a_layout_of_another_name_and_a_folder_without_pairs(tmp_path):
    with pytest.raises(ValueError, match="data must be one of voc20, .*, got 'voc'"):
        class_mask_pairs("voc", str(tmp_path))
    write_pair(tmp_path, "coco_stuff", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"1\.jpg has no mask"):
        class_mask_pairs("coco_object", str(tmp_path)).val_set()
    write_pair(tmp_path, "voc21", np.zeros((4, 4), np.uint8))
    (tmp_path / LISTS["voc"]).write_text("\n")
    with pytest.raises(ValueError, match="no pairs of an image and a mask for val in"):
        class_mask_pairs("voc21", str(tmp_path)).val_set()


def test_lists_choose_the_pairs_of_each_split(tmp_path):
    """Catches: a list that is not read; a name of the list without files that is passed over."""
    for folder in ("images", "annotations", "lists"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.jpg")
        Image.new("L", (4, 4)).save(tmp_path / "annotations" / f"{name}.png")
    (tmp_path / "lists" / "validation.txt").write_text("c\n\na\n")
    pairs = Pairs(root=str(tmp_path), classes=2, lists="lists")
    assert [pair.image.stem for pair in pairs.val_set().pairs] == ["c", "a"]
    with pytest.raises(ValueError, match=r"no such file: .*training.txt. data.lists names"):
        pairs.build(0)
    (tmp_path / "lists" / "training.txt").write_text("b\nd\n")
    assert list(check_pairs(pairs, tmp_path)) == ["d of training.txt has neither image nor mask"]
    with pytest.raises(ValueError, match="d of training.txt has neither image nor mask"):
        pairs.build(0)
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "lists" / "training.txt").write_text("b\n")
    assert list(check_pairs(pairs, tmp_path)) == [f"{tmp_path}/annotations/a.png has no image"]
