import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat

from tokendial.data import FGVC
from tokendial.runs import read_recipe

# What each list file of CUB holds: number and value.
CUB = {
    "images.txt": [
        "1 001.Black_footed_Albatross/a.jpg",
        "2 001.Black_footed_Albatross/b.jpg",
        "3 002.Laysan_Albatross/c.jpg",
        "4 002.Laysan_Albatross/d.jpg",
    ],
    "image_class_labels.txt": ["1 1", "2 1", "3 2", "4 2"],
    "train_test_split.txt": ["1 1", "2 0", "3 1", "4 1"],
}


def build(root, task, **settings):
    return FGVC(**{"root": str(root), "task": task, "check": False} | settings).build(0)


def labels(dataset):
    return [label for _, label in dataset]


def all_show(shows, dataset, pieces):
    return all(shows(image, piece) for (image, _), piece in zip(dataset, pieces, strict=True))


@pytest.fixture
def cub(save):
    root = save(f"images/{line.split()[1]}" for line in CUB["images.txt"])
    for name, lines in CUB.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def test_cub_by_its_own_lists(cub, shows):
    splits = build(cub, "cub")
    assert labels(splits.train) == [0, 1, 1]
    assert labels(splits.val) == [0]
    assert all_show(shows, splits.train, [0, 2, 3])
    assert all_show(shows, splits.val, [1])
    assert splits.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("images.txt", "1", r"images.txt, line 1: must look like '1 images/1.jpg', got '1'"),
        ("images.txt", "1 x.jpg", r"images.txt, line 1: no such image: .*images/x.jpg"),
        ("images.txt", "9 002.Laysan_Albatross/c.jpg", r"image 9 is not in .*image_class_labels"),
        ("image_class_labels.txt", "1 201", r"class id must be a whole number in \[1, 200\], got"),
        (
            "image_class_labels.txt",
            "1 0",
            r"class id must be a whole number in \[1, 200\], got '0'",
        ),
        ("train_test_split.txt", "1 2", r"line 1: is_training_image must .* in \[0, 1\], got '2'"),
        ("train_test_split.txt", "5 1", r"images.txt, line 1: image 1 is not in .*train_test_sp"),
    ],
)
def test_errors_in_a_cub_list_name_the_line(cub, name, line, message):
    (cub / name).write_text("\n".join([line, *CUB[name][1:]]))
    with pytest.raises(ValueError, match=message):
        build(cub, "cub")


def annotations(rows, **texts):
    """An array of records as scipy reads MATLAB's struct arrays: class, test and a text."""
    kinds = [(name, object) for name in (*texts, "bbox_x1", "class", "test")]
    found = np.zeros((1, len(rows)), kinds)
    for number, (class_id, test) in enumerate(rows):
        values = {name: column[number] for name, column in texts.items()}
        values |= {"bbox_x1": 5.0, "class": np.uint8(class_id), "test": np.uint8(test)}
        for name, value in values.items():
            found[name][0, number] = value
    return found


def cell(*texts):
    found = np.empty((1, len(texts)), object)
    found[0] = texts
    return found


NAMES = cell("AM General Hummer SUV 2000", "Acura RL Sedan 2012")


@pytest.fixture
def cars(save):
    """Stanford Cars in the layout of the development kit."""
    root = save([*(f"cars_train/0000{n}.jpg" for n in (1, 2, 3)), "cars_test/00001.jpg"])
    (root / "devkit").mkdir()
    train = annotations([(2, 0), (1, 0), (2, 0)], fname=[f"0000{n}.jpg" for n in (1, 2, 3)])
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": train})
    test = annotations([(1, 1)], fname=["00001.jpg"])
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": test})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": NAMES})
    return root


def test_cars_by_the_development_kit(cars, shows):
    splits = build(cars, "cars")
    assert labels(splits.train) == [1, 0, 1]
    assert labels(splits.val) == [0]
    assert all_show(shows, splits.train, [0, 1, 2])
    assert all_show(shows, splits.val, [3])
    assert splits.classes == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")


def test_cars_in_one_folder(save, shows):
    names = [f"car_ims/00000{n}.jpg" for n in (1, 2, 3)]
    root = save(names)
    rows = annotations([(1, 0), (2, 1), (2, 0)], relative_im_path=names)
    savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": NAMES})
    splits = build(root, "cars")
    assert (labels(splits.train), labels(splits.val)) == ([0, 1], [1])
    assert all_show(shows, splits.train, [0, 2])
    assert all_show(shows, splits.val, [1])
    assert splits.classes[0] == "AM General Hummer SUV 2000"


def test_test_annotations_without_labels_are_refused(cars):
    rows = np.zeros((1, 1), [("fname", object)])
    rows["fname"][0, 0] = "00001.jpg"
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": rows})
    with pytest.raises(ValueError, match=r"withlabels.mat: annotations have no field 'class'"):
        build(cars, "cars")


def test_dogs_by_their_own_lists(save, shows):
    names = ["n02085620-Chihuahua/a.jpg", "n02085620-Chihuahua/b.jpg", "n02116738-dhole/c.jpg"]
    root = save(f"Images/{name}" for name in names)
    train = {"file_list": cell(*names[::2]).T, "labels": np.array([[1.0], [120.0]])}
    test = {"file_list": cell(names[1]).T, "labels": np.array([[1.0]])}
    savemat(root / "train_list.mat", train)
    (root / "lists").mkdir()
    savemat(root / "lists" / "test_list.mat", test)
    splits = build(root, "dogs")
    assert (labels(splits.train), labels(splits.val)) == ([0, 1], [0])
    assert all_show(shows, splits.train, [0, 2])
    assert all_show(shows, splits.val, [1])
    assert splits.classes == ("n02085620-Chihuahua", "n02116738-dhole")


@pytest.fixture
def flowers(save):
    root = save(f"jpg/image_{number:05d}.jpg" for number in range(1, 7))
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 77, 5, 5, 77, 5]], np.uint8)})
    parts = {"trnid": [[1, 3]], "valid": [[4, 2]], "tstid": [[6, 5]]}
    savemat(root / "setid.mat", {name: np.uint16(part) for name, part in parts.items()})
    return root


@pytest.mark.parametrize(
    ("val", "train", "validated"),
    [
        ("test", ([0, 2], [1, 0]), ([5, 4], [0, 1])),
        ("val", ([0, 2], [1, 0]), ([3, 1], [0, 1])),
    ],
)
def test_flowers_by_their_own_lists(flowers, shows, val, train, validated):
    splits = build(flowers, "flowers", val=val)
    for dataset, (pieces, expected) in ((splits.train, train), (splits.val, validated)):
        assert labels(dataset) == expected
        assert all_show(shows, dataset, pieces)
    assert splits.classes == ("class 5", "class 77")


def test_recipes_of_tocom_train_on_the_official_training_list_as_its_code_does(flowers):
    recipe = read_recipe("tocom/flowers")
    (flowers / "train.json").write_text('{"jpg/image_00001.jpg": 0}')
    splits = replace(recipe.data, root=str(flowers), check=False).build(0)
    assert [path.name for path, _ in splits.train.files] == ["image_00001.jpg", "image_00003.jpg"]
    assert [path.name for path, _ in splits.val.files] == ["image_00006.jpg", "image_00005.jpg"]


def test_numbers_of_images_that_do_not_exist_are_refused(flowers):
    parts = {"trnid": [[1, 3]], "valid": [[4]], "tstid": [[7]]}
    savemat(flowers / "setid.mat", {name: np.uint16(part) for name, part in parts.items()})
    with pytest.raises(ValueError, match=r"setid.mat: images must lie in \[1, 6\]"):
        build(flowers, "flowers")


@pytest.fixture
def json_cub(cub):
    """Lists whose class ids start at 3 and have gaps."""
    names = [line.split()[1] for line in CUB["images.txt"]]
    for split, part, ids in (
        ("train", names[1:3], (3, 9)),
        ("val", names[:1], (3,)),
        ("test", names[3:], (9,)),
    ):
        (cub / f"{split}.json").write_text(json.dumps(dict(zip(part, ids, strict=True))))
    return cub


@pytest.mark.parametrize(("val", "shown", "expected"), [("val", [0], [0]), ("test", [3], [1])])
def test_json_lists_come_first_and_ids_are_numbered_from_0(json_cub, shows, val, shown, expected):
    splits = build(json_cub, "cub", val=val)
    assert (labels(splits.train), labels(splits.val)) == ([0, 1], expected)
    assert all_show(shows, splits.train, [1, 2])
    assert all_show(shows, splits.val, shown)
    assert splits.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")


def test_official_lists_can_be_chosen_beside_json_lists(json_cub):
    assert len(build(json_cub, "cub", lists="official").train) == 3


def test_without_a_validation_list_training_images_are_held_out(json_cub):
    (json_cub / "val.json").unlink()
    names = [line.split()[1] for line in CUB["images.txt"]]
    (json_cub / "train.json").write_text(
        json.dumps(dict.fromkeys(names[:2], 3) | dict.fromkeys(names[2:], 9))
    )
    splits = build(json_cub, "cub", val="val", holdout=0.5)
    assert (labels(splits.train), labels(splits.val)) == ([0, 1], [0, 1])


def test_classes_without_folders_of_their_own_have_their_ids_as_names(save):
    root = save(["images/all/a.jpg", "images/all/b.jpg"])
    for split in ("train", "test"):
        (root / f"{split}.json").write_text(json.dumps({"all/a.jpg": 7, "all/b.jpg": 2}))
    assert build(root, "cub").classes == ("class 2", "class 7")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "train.json is not JSON"),
        ("[]", "train.json must be a mapping of image paths to class ids"),
        ("{}", "train.json must be a mapping of image paths to class ids"),
        ('{"a.jpg": "1"}', "train.json: class id of 'a.jpg' must be a whole number, got '1'"),
        ('{"a.jpg": 1}', r"train.json: no such image: .*images/a.jpg"),
        (
            '{"001.Black_footed_Albatross/b.jpg": 3}',
            r"class 9 of .*d.jpg is not in the training set of cub",
        ),
    ],
)
def test_errors_in_a_json_list_name_the_file(json_cub, content, message):
    (json_cub / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        build(json_cub, "cub")
    assert "\n" not in str(caught.value)


def test_a_holdout_beside_a_list_for_validation_is_refused(json_cub):
    with pytest.raises(ValueError, match=r"holdout must be 0, as cub has a list for .*, got 0.1"):
        build(json_cub, "cub", holdout=0.1)


@pytest.mark.parametrize(("task", "classes"), [("cub", 200), ("flowers", 102)])
def test_a_part_of_a_set_needs_check_false(request, task, classes):
    root = request.getfixturevalue(task)
    with pytest.raises(ValueError, match=f"classes of {task} must be {classes}, got 2; data.check"):
        build(root, task, check=True)


def test_images_of_official_lists_are_counted(save):
    folders = [f"{number:03d}.Bird" for number in range(1, 201)]
    root = save(f"images/{folder}/1.jpg" for folder in folders)
    lines = {
        "images.txt": [f"{n} {folder}/1.jpg" for n, folder in enumerate(folders, start=1)],
        "image_class_labels.txt": [f"{n} {n}" for n in range(1, 201)],
        "train_test_split.txt": [f"{n} 1" for n in range(1, 201)],
    }
    for name, content in lines.items():
        (root / name).write_text("\n".join(content))
    with pytest.raises(ValueError, match=r"training images of cub must be 5,994, got 200"):
        build(root, "cub", check=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cub", r"no such file: .*images.txt. CUB-200-2011, https"),
        ("cars", r"no such file: .*devkit/cars_train_annos.mat. Stanford Cars is a folder"),
        ("dogs", r"no such file: .*lists/train_list.mat. Stanford Dogs, http"),
        ("flowers", r"no such file: .*imagelabels.mat. Oxford 102 Flowers, https"),
    ],
)
def test_missing_lists_are_named_with_where_to_get_them(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, task)
    with pytest.raises(ValueError, match=r"data.root: no such folder: .*nowhere"):
        build(tmp_path / "nowhere", task)


def test_a_missing_and_an_unreadable_image_are_named(flowers):
    path = flowers / "jpg" / "image_00001.jpg"
    path.write_bytes(b"no picture")
    for val in ("val", "test"):
        with pytest.raises(ValueError, match=r"^data: .*image_00001.jpg is not an image\.$"):
            build(flowers, "flowers", val=val)
    path.unlink()
    with pytest.raises(ValueError, match=r"setid.mat: no such image: .*image_00001.jpg"):
        build(flowers, "flowers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "nabirds"}, "task must be one of cub, cars, dogs, flowers, got 'nabirds'"),
        ({"task": "cub", "lists": "csv"}, "lists must be one of auto, json, official, got 'csv'"),
        ({"task": "cub", "val": "x"}, "val must be one of val, test, got 'x'"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        FGVC(root="cub", **settings)
