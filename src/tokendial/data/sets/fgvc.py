"""Fine-grained classification: CUB-200-2011, Stanford Cars, Stanford Dogs, Oxford Flowers.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011; Krause et al., "3D Object
Representations for Fine-Grained Categorization", 2013; Khosla et al., "Novel Dataset for
Fine-Grained Image Categorization", 2011; Nilsback and Zisserman, "Automated Flower Classification
over a Large Number of Classes", 2008. The JSON lists are those of VPT (Jia et al., ECCV 2022,
https://github.com/KMnP/vpt), which papers on parameter-efficient fine-tuning use.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokendial.checks import check_choice
from tokendial.data.readers.lists import (
    parse_number,
    read_two_columns,
    require_file,
    require_folder,
    require_image,
)
from tokendial.data.readers.matlab import read_mat
from tokendial.data.sets.labelled_images import ImageFiles, LabelledFiles, drop_broken_images
from tokendial.data.sets.official import OfficialSet
from tokendial.data.splits import Splits
from tokendial.methods import register


@dataclass(frozen=True, slots=True)
class _Lists:
    """The lists of a data set, with its own class ids: they start anywhere and may have gaps."""

    train: LabelledFiles
    test: LabelledFiles
    val: LabelledFiles = field(default_factory=list)
    names: Mapping[int, str] = field(default_factory=dict)
    """Class names by id, if the data set stores them; else the image folders name the classes."""


@dataclass(frozen=True, slots=True)
class _Task:
    """Published sizes and layout of one of the four data sets."""

    num_classes: int
    num_train: int
    """Number of images in the official lists for training and validation together."""
    num_test: int
    images: str
    """Folder below the root in which the paths of the JSON lists start."""
    read_official: Callable[[Path, str], _Lists]
    """Reads the official lists from the root folder."""
    source: str
    """Sentence that says where to get the data set, for errors."""


@register("data", "fgvc")
@dataclass(frozen=True, kw_only=True, slots=True)
class FGVC(OfficialSet):
    """One of four fine-grained data sets, by its official lists or by `{train,val,test}.json`.

    As in the code of ToCom and VPT, the model is trained on the official training list or
    train.json, never on a validation list. `val: val` validates on the validation list if there is
    one (Flowers, val.json), else on a `holdout` of the training list.
    """

    task: Literal["cub", "cars", "dogs", "flowers"]
    """Data set. cub: CUB-200-2011; cars: Stanford Cars; dogs: Stanford Dogs; flowers: Oxford 102
    Flowers."""
    lists: Literal["auto", "json", "official"] = "auto"
    """Lists to read. json: {train,val,test}.json of VPT; official: those the data set is published
    with; auto: json if there is a train.json, else official."""

    def __post_init__(self) -> None:
        OfficialSet.__post_init__(self)
        check_choice("task", self.task, tuple(_TASKS))
        check_choice("lists", self.lists, ("auto", "json", "official"))

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a file or an image is missing, an image cannot be read, a list has the
                wrong form, there are more or fewer images or classes than published, or `holdout`
                is set although there is a validation list.
        """
        task, root = _TASKS[self.task], Path(self.root)
        require_folder(root, task.source)
        as_json = self.lists == "json" or (self.lists == "auto" and (root / "train.json").exists())
        lists = _read_json_lists(root, task) if as_json else task.read_official(root, task.source)
        self._check_lists(lists, as_json)
        ids = sorted({class_id for _, class_id in lists.train})
        labels = {class_id: label for label, class_id in enumerate(ids)}
        names = lists.names or _folder_names(lists.train)
        classes = [names.get(class_id, f"class {class_id}") for class_id in ids]
        train, val, test = (_label(part, labels) for part in (lists.train, lists.val, lists.test))
        if self.val == "val" and lists.val:
            drop_broken_images(root, [train.files, val.files])
            return Splits(train=train, val=val, classes=tuple(classes))
        return self.splits(train, test, classes, seed)

    def _check_lists(self, lists: _Lists, as_json: bool) -> None:
        task = _TASKS[self.task]
        classes = {class_id for _, class_id in lists.train}
        self.check_count(f"number of classes of {self.task}", len(classes), task.num_classes)
        for path, class_id in lists.val + lists.test:
            if class_id not in classes:
                raise ValueError(
                    f"data: class {class_id} of {path} is not in the training set of {self.task}."
                )
        if not as_json:
            trained = len(lists.train) + len(lists.val)
            self.check_count(f"number of training images of {self.task}", trained, task.num_train)
            self.check_count(
                f"number of test images of {self.task}", len(lists.test), task.num_test
            )
        if lists.val and self.holdout:
            raise ValueError(
                f"data.holdout must be 0, as {self.task} has a list for validation, "
                f"got {self.holdout}."
            )


def _label(listed: LabelledFiles, labels: Mapping[int, int]) -> ImageFiles:
    """Return the images with labels from 0 on instead of class ids."""
    return ImageFiles([(path, labels[class_id]) for path, class_id in listed])


def _folder_names(listed: LabelledFiles) -> dict[int, str]:
    """Return {class id: folder name} if each class has a folder of its own; else an empty dict."""
    folders = {(class_id, path.parent.name) for path, class_id in listed}
    ids, names = {class_id for class_id, _ in folders}, {name for _, name in folders}
    return dict(folders) if len(ids) == len(names) == len(folders) else {}


def _read_json_lists(root: Path, task: _Task) -> _Lists:
    val = root / "val.json"
    return _Lists(
        train=_read_json_list(root, "train", task),
        test=_read_json_list(root, "test", task),
        val=_read_json_list(root, "val", task) if val.exists() else [],
    )


def _read_json_list(root: Path, split: str, task: _Task) -> LabelledFiles:
    path = require_file(root / f"{split}.json", task.source)
    try:
        class_ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data: {path} is not JSON ({error}).") from None
    if not isinstance(class_ids, dict) or not class_ids:
        raise ValueError(f"data: {path} must be a mapping of image paths to class ids.")
    listed = []
    for name, class_id in class_ids.items():
        if type(class_id) is not int:
            raise ValueError(
                f"data: {path}: class id of {name!r} must be a whole number, got {class_id!r}."
            )
        listed.append((require_image(root / task.images / name, str(path)), class_id))
    return listed


def _read_cub(root: Path, source: str) -> _Lists:
    def column(name: str) -> dict[str, tuple[str, str]]:
        """Return {image number: (place in the list, value)} of a list."""
        example = "1 images/1.jpg" if name == "images.txt" else "1 1"
        lines = read_two_columns(root / name, example, source)
        return {number: (place, value) for place, number, value in lines}

    images, labels, splits = map(
        column, ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    listed: tuple[LabelledFiles, LabelledFiles] = [], []
    for number, (place, name) in images.items():
        if number not in labels or number not in splits:
            short = "image_class_labels.txt" if number not in labels else "train_test_split.txt"
            raise ValueError(f"data: {place}: image {number} is not in {root / short}.")
        path = require_image(root / "images" / name, place)
        label_place, label = labels[number]
        class_id = parse_number(label, "class id", 1, 200, label_place)
        split_place, split = splits[number]
        in_training = parse_number(split, "is_training_image", 0, 1, split_place)
        listed[in_training].append((path, class_id))
    test, train = listed
    return _Lists(train=train, test=test)


def _read_cars(root: Path, source: str) -> _Lists:
    """Read cars_annos.mat, which lists all images, or the separate lists of the development kit."""
    if (annotations := root / "cars_annos.mat").exists():
        rows, names = read_mat(annotations, source, "annotations", "class_names")
        listed = _read_rows(root, annotations, rows, "relative_im_path")
        in_test = [bool(flag) for flag in _read_field(annotations, rows, "test")]
        train = [item for item, is_test in zip(listed, in_test, strict=True) if not is_test]
        test = [item for item, is_test in zip(listed, in_test, strict=True) if is_test]
    else:
        train_list = _find_list(root, "devkit", "cars_train_annos.mat")
        test_list = _find_list(root, "devkit", "cars_test_annos_withlabels.mat")
        meta = _find_list(root, "devkit", "cars_meta.mat")
        (train_rows,) = read_mat(train_list, source, "annotations")
        (test_rows,) = read_mat(test_list, source, "annotations")
        train = _read_rows(root / "cars_train", train_list, train_rows, "fname")
        test = _read_rows(root / "cars_test", test_list, test_rows, "fname")
        (names,) = read_mat(meta, source, "class_names")
    return _Lists(
        train=train,
        test=test,
        names={number: str(name) for number, name in enumerate(names, start=1)},
    )


def _find_list(root: Path, folder: str, name: str) -> Path:
    """Return the path of a list: in the root, or in the folder in which it is published."""
    return root / name if (root / name).exists() else root / folder / name


def _read_field(path: Path, rows: np.ndarray, name: str) -> Iterable[Any]:
    if name not in (rows.dtype.names or ()):
        raise ValueError(f"data: {path}: annotations have no field {name!r}.")
    values: Iterable[Any] = rows[name]
    return values


def _read_rows(folder: Path, path: Path, rows: np.ndarray, name: str) -> LabelledFiles:
    return _label_paths(
        folder, path, _read_field(path, rows, name), _read_field(path, rows, "class")
    )


def _label_paths(
    folder: Path, path: Path, names: Iterable[Any], ids: Iterable[Any]
) -> LabelledFiles:
    return [
        (require_image(folder / str(name), str(path)), int(number))
        for name, number in zip(names, ids, strict=True)
    ]


def _read_dogs(root: Path, source: str) -> _Lists:
    def listed(name: str) -> LabelledFiles:
        path = _find_list(root, "lists", name)
        return _label_paths(root / "Images", path, *read_mat(path, source, "file_list", "labels"))

    return _Lists(train=listed("train_list.mat"), test=listed("test_list.mat"))


def _read_flowers(root: Path, source: str) -> _Lists:
    (labels,) = read_mat(root / "imagelabels.mat", source, "labels")
    path = root / "setid.mat"

    def listed(numbers: np.ndarray) -> LabelledFiles:
        if numbers.min(initial=1) < 1 or numbers.max(initial=1) > len(labels):
            raise ValueError(f"data: {path}: images must lie in [1, {len(labels)}].")
        names = [f"image_{number:05d}.jpg" for number in numbers]
        return _label_paths(root / "jpg", path, names, labels[numbers.astype(int) - 1])

    train, val, test = map(listed, read_mat(path, source, "trnid", "valid", "tstid"))
    return _Lists(train=train, val=val, test=test)


_TASKS = {
    "cub": _Task(
        200, 5_994, 5_794, "images", _read_cub,
        "CUB-200-2011, https://www.vision.caltech.edu/datasets/cub_200_2011, is a folder that "
        "holds images/, images.txt, image_class_labels.txt and train_test_split.txt.",
    ),
    "cars": _Task(
        196, 8_144, 8_041, "", _read_cars,
        "Stanford Cars is a folder that holds cars_train/, cars_test/ and devkit/ with "
        "cars_test_annos_withlabels.mat, or car_ims/ and cars_annos.mat; its home page, "
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, gives no files any more, "
        "copies of it do.",
    ),
    "dogs": _Task(
        120, 12_000, 8_580, "Images", _read_dogs,
        "Stanford Dogs, http://vision.stanford.edu/aditya86/ImageNetDogs, is a folder that holds "
        "Images/, train_list.mat and test_list.mat.",
    ),
    "flowers": _Task(
        102, 2_040, 6_149, "", _read_flowers,
        "Oxford 102 Flowers, https://www.robots.ox.ac.uk/~vgg/data/flowers/102, is a folder that "
        "holds jpg/, imagelabels.mat and setid.mat.",
    ),
}  # fmt: skip
