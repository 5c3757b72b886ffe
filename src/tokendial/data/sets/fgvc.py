"""Fine-grained classification: CUB-200-2011, Stanford Cars, Stanford Dogs, Oxford Flowers.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011; Krause et al., "3D Object
Representations for Fine-Grained Categorization", 2013; Khosla et al., "Novel Dataset for
Fine-Grained Image Categorization", 2011; Nilsback and Zisserman, "Automated Flower Classification
over a Large Number of Classes", 2008. The lists as JSON are those of VPT (Jia et al., ECCV 2022,
https://github.com/KMnP/vpt), which papers on parameter-efficient fine-tuning share.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokendial.data.readers.matlab import read_mat
from tokendial.data.sets.labelled import (
    Files,
    OfficialSet,
    existing,
    read_number,
    read_pairs,
    required_file,
    required_folder,
    whole_images,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

_Listed = list[tuple[Path, int]]


@dataclass(frozen=True, slots=True)
class _Lists:
    """Images with the set's own class ids, which start anywhere and may have gaps."""

    train: _Listed
    test: _Listed
    val: _Listed = field(default_factory=list)
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the classes by id, where the set tells them apart from its folders."""


@dataclass(frozen=True, slots=True)
class _Task:
    classes: int
    train: int
    """Images of the official lists for training and validation together."""
    test: int
    images: str
    """Folder that the paths in JSON lists start from."""
    official: Callable[[Path, str], _Lists]
    """Reads the lists that the set is published with."""
    source: str


@register("data", "fgvc")
@dataclass(frozen=True, kw_only=True, slots=True)
class FGVC(OfficialSet):
    """One of four sets, with its official lists or `{train,val,test}.json` beside them.

    The official training list is trained on, or train.json, as in ToCom's and VPT's code: images of
    a list for validation (Flowers has one) never are. `val` val validates on that list, where there
    is one, and on a `holdout` where there is none.
    """

    task: Literal["cub", "cars", "dogs", "flowers"]
    """Which set."""
    lists: Literal["auto", "json", "official"] = "auto"
    """Which lists; auto: the JSON files if there is a train.json."""

    def __post_init__(self) -> None:
        OfficialSet.__post_init__(self)
        for name, allowed in (("task", tuple(_TASKS)), ("lists", ("auto", "json", "official"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a file or an image is missing, an image cannot be read, a list is not
                what it should be, there are more or fewer images or classes than published, or
                `holdout` is set where there is a list for validation.
        """
        task, root = _TASKS[self.task], Path(self.root)
        required_folder(root, task.source)
        as_json = self.lists == "json" or (self.lists == "auto" and (root / "train.json").exists())
        lists = _json(root, task) if as_json else task.official(root, task.source)
        self._check(lists, as_json)
        ids = sorted({class_id for _, class_id in lists.train})
        numbers = {class_id: number for number, class_id in enumerate(ids)}
        names = lists.names or _folder_names(lists.train)
        classes = [names.get(class_id, f"class {class_id}") for class_id in ids]
        train, val, test = (_files(part, numbers) for part in (lists.train, lists.val, lists.test))
        if self.val == "val" and lists.val:
            whole_images(root, [train.files, val.files])
            return Splits(train=train, val=val, classes=tuple(classes))
        return self.splits(train, test, classes, seed)

    def _check(self, lists: _Lists, as_json: bool) -> None:
        task = _TASKS[self.task]
        classes = {class_id for _, class_id in lists.train}
        self.check_count(f"number of classes of {self.task}", len(classes), task.classes)
        for path, class_id in lists.val + lists.test:
            if class_id not in classes:
                raise ValueError(
                    f"data: class {class_id} of {path} is not in the training set of {self.task}."
                )
        if not as_json:
            trained = len(lists.train) + len(lists.val)
            self.check_count(f"number of training images of {self.task}", trained, task.train)
            self.check_count(f"number of test images of {self.task}", len(lists.test), task.test)
        if lists.val and self.holdout:
            raise ValueError(
                f"data.holdout must be 0, as {self.task} has a list for validation, "
                f"got {self.holdout}."
            )


def _files(listed: _Listed, numbers: Mapping[int, int]) -> Files:
    return Files([(path, numbers[class_id]) for path, class_id in listed])


def _folder_names(listed: _Listed) -> dict[int, str]:
    """The folders' names by class id, if each class has a folder of its own; else nothing."""
    folders = {(class_id, path.parent.name) for path, class_id in listed}
    own = len({class_id for class_id, _ in folders}) == len(folders)
    return dict(folders) if own and len({name for _, name in folders}) == len(folders) else {}


def _json(root: Path, task: _Task) -> _Lists:
    val = root / "val.json"
    return _Lists(
        train=_json_list(root, "train", task),
        test=_json_list(root, "test", task),
        val=_json_list(root, "val", task) if val.exists() else [],
    )


def _json_list(root: Path, split: str, task: _Task) -> _Listed:
    path = required_file(root / f"{split}.json", task.source)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data: {path} is not JSON ({error}).") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"data: {path} must be a mapping of image paths to class ids.")
    listed = []
    for name, class_id in found.items():
        if type(class_id) is not int:
            raise ValueError(
                f"data: {path}: class id of {name!r} must be a whole number, got {class_id!r}."
            )
        listed.append((existing(root / task.images / name, str(path)), class_id))
    return listed


def _cub(root: Path, source: str) -> _Lists:
    def column(name: str) -> dict[str, tuple[str, str]]:
        pairs = read_pairs(
            root / name, f"1 {'images/1.jpg' if name == 'images.txt' else 1}", source
        )
        return {number: (place, value) for place, number, value in pairs}

    images, labels, splits = map(
        column, ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    listed: tuple[_Listed, _Listed] = [], []
    for number, (place, name) in images.items():
        if number not in labels or number not in splits:
            short = "image_class_labels.txt" if number not in labels else "train_test_split.txt"
            raise ValueError(f"data: {place}: image {number} is not in {root / short}.")
        path = existing(root / "images" / name, place)
        label_place, label = labels[number]
        class_id = read_number(label, "class id", 1, 200, label_place)
        split_place, split = splits[number]
        in_training = read_number(split, "is_training_image", 0, 1, split_place)
        listed[in_training].append((path, class_id))
    test, train = listed
    return _Lists(train=train, test=test)


def _cars(root: Path, source: str) -> _Lists:
    """The archive of one folder and cars_annos.mat, or the two of the development kit."""
    if (joint := root / "cars_annos.mat").exists():
        rows, names = read_mat(joint, source, "annotations", "class_names")
        listed = _rows(root, joint, rows, "relative_im_path")
        is_test = [bool(test) for test in _field(joint, rows, "test")]
        train = [item for item, out in zip(listed, is_test, strict=True) if not out]
        test = [item for item, out in zip(listed, is_test, strict=True) if out]
    else:
        train_list = _either(root, "devkit", "cars_train_annos.mat")
        test_list = _either(root, "devkit", "cars_test_annos_withlabels.mat")
        meta = _either(root, "devkit", "cars_meta.mat")
        (train_rows,) = read_mat(train_list, source, "annotations")
        (test_rows,) = read_mat(test_list, source, "annotations")
        train = _rows(root / "cars_train", train_list, train_rows, "fname")
        test = _rows(root / "cars_test", test_list, test_rows, "fname")
        (names,) = read_mat(meta, source, "class_names")
    return _Lists(
        train=train,
        test=test,
        names={number: str(name) for number, name in enumerate(names, start=1)},
    )


def _either(root: Path, folder: str, name: str) -> Path:
    """Where a list lies: beside the images, or in the folder that it is published in."""
    return root / name if (root / name).exists() else root / folder / name


def _field(path: Path, rows: np.ndarray, name: str) -> Iterable[Any]:
    if name not in (rows.dtype.names or ()):
        raise ValueError(f"data: {path}: annotations have no field {name!r}.")
    found: Iterable[Any] = rows[name]
    return found


def _rows(folder: Path, path: Path, rows: np.ndarray, name: str) -> _Listed:
    return _listed(folder, path, _field(path, rows, name), _field(path, rows, "class"))


def _listed(folder: Path, path: Path, names: Iterable[Any], ids: Iterable[Any]) -> _Listed:
    return [
        (existing(folder / str(name), str(path)), int(number))
        for name, number in zip(names, ids, strict=True)
    ]


def _dogs(root: Path, source: str) -> _Lists:
    def listed(name: str) -> _Listed:
        path = _either(root, "lists", name)
        return _listed(root / "Images", path, *read_mat(path, source, "file_list", "labels"))

    return _Lists(train=listed("train_list.mat"), test=listed("test_list.mat"))


def _flowers(root: Path, source: str) -> _Lists:
    (labels,) = read_mat(root / "imagelabels.mat", source, "labels")
    path = root / "setid.mat"

    def listed(numbers: np.ndarray) -> _Listed:
        if numbers.min(initial=1) < 1 or numbers.max(initial=1) > len(labels):
            raise ValueError(f"data: {path}: images must lie in [1, {len(labels)}].")
        names = [f"image_{number:05d}.jpg" for number in numbers]
        return _listed(root / "jpg", path, names, labels[numbers.astype(int) - 1])

    train, val, test = map(listed, read_mat(path, source, "trnid", "valid", "tstid"))
    return _Lists(train=train, val=val, test=test)


_TASKS = {
    "cub": _Task(
        200, 5_994, 5_794, "images", _cub,
        "CUB-200-2011, https://www.vision.caltech.edu/datasets/cub_200_2011, is a folder that "
        "holds images/, images.txt, image_class_labels.txt and train_test_split.txt.",
    ),
    "cars": _Task(
        196, 8_144, 8_041, "", _cars,
        "Stanford Cars is a folder that holds cars_train/, cars_test/ and devkit/ with "
        "cars_test_annos_withlabels.mat, or car_ims/ and cars_annos.mat; its home page, "
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, gives no files any more, "
        "copies of it do.",
    ),
    "dogs": _Task(
        120, 12_000, 8_580, "Images", _dogs,
        "Stanford Dogs, http://vision.stanford.edu/aditya86/ImageNetDogs, is a folder that holds "
        "Images/, train_list.mat and test_list.mat.",
    ),
    "flowers": _Task(
        102, 2_040, 6_149, "", _flowers,
        "Oxford 102 Flowers, https://www.robots.ox.ac.uk/~vgg/data/flowers/102, is a folder that "
        "holds jpg/, imagelabels.mat and setid.mat.",
    ),
}  # fmt: skip
