"""VTAB-1k: 19 tasks of 1,000 training images each, as lists of files.

Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation
Benchmark", https://arxiv.org/abs/1910.04867. The layout on disk is that of NOAH
(https://arxiv.org/abs/2206.04673), which papers on parameter-efficient fine-tuning use.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tokendial.checks import check_choice
from tokendial.data.readers.files import PATH
from tokendial.data.readers.lists import (
    parse_number,
    read_two_columns,
    require_folder,
    require_image,
)
from tokendial.data.sets.labelled_images import ImageFiles, drop_broken_images
from tokendial.data.sets.official import check_count
from tokendial.data.splits import Splits
from tokendial.methods import register


class VTABTask(NamedTuple):
    """Sizes of a task of VTAB-1k."""

    classes: int
    """Number of classes."""
    test: int
    """Number of images in the test set."""


VTAB_GROUPS: dict[str, dict[str, VTABTask]] = {
    "natural": {
        "cifar": VTABTask(100, 10_000),
        "caltech101": VTABTask(102, 6_084),
        "dtd": VTABTask(47, 1_880),
        "oxford_flowers102": VTABTask(102, 6_149),
        "oxford_iiit_pet": VTABTask(37, 3_669),
        "svhn": VTABTask(10, 26_032),
        "sun397": VTABTask(397, 21_750),
    },
    "specialized": {
        "patch_camelyon": VTABTask(2, 32_768),
        "eurosat": VTABTask(10, 5_400),
        "resisc45": VTABTask(45, 6_300),
        "diabetic_retinopathy": VTABTask(5, 42_670),
    },
    "structured": {
        "clevr_count": VTABTask(8, 15_000),
        "clevr_dist": VTABTask(6, 15_000),
        "dmlab": VTABTask(6, 22_735),
        "kitti": VTABTask(4, 711),
        "dsprites_loc": VTABTask(16, 73_728),
        "dsprites_ori": VTABTask(16, 73_728),
        "smallnorb_azi": VTABTask(18, 12_150),
        "smallnorb_ele": VTABTask(9, 12_150),
    },
}
"""The 19 tasks in the three groups whose mean accuracies are published."""
VTAB_TASKS = {name: task for group in VTAB_GROUPS.values() for name, task in group.items()}
"""The 19 tasks by name."""

_SOURCE = (
    "The code of NOAH, https://github.com/ZhangYuanhan-AI/NOAH, makes the images and lists "
    "(data/vtab-source/get_vtab1k.py)."
)
_LISTS = {
    "search": (("train800.txt", 800), ("val200.txt", 200)),
    "final": (("train800val200.txt", 1000), ("test.txt", None)),
}


@register("data", "vtab")
@dataclass(frozen=True, kw_only=True, slots=True)
class VTAB:
    """A task of VTAB-1k, by the lists `root/TASK/{train800,val200,train800val200,test}.txt`.

    Lines of a list are `path label`, paths below `root/TASK`.
    """

    root: str = field(metadata=PATH)
    """Folder that holds one folder for each task."""
    task: str
    """Name of one of the 19 tasks, such as cifar or clevr_count."""
    split: Literal["search", "final"] = "final"
    """Lists to use. search: train on train800.txt and validate on val200.txt, for choosing
    settings; final: train on all 1,000 images of train800val200.txt and validate on test.txt."""
    check: bool = True
    """Whether the lists must have the published numbers of images. Set to false to use shorter
    lists."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, tuple(VTAB_TASKS))
        check_choice("split", self.split, tuple(_LISTS))

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list or an image is missing, a list does not have the published
                length, a line is not a path and a label, a label is not a class, or an image cannot
                be read.
        """
        task = VTAB_TASKS[self.task]
        folder = require_folder(require_folder(Path(self.root), _SOURCE) / self.task, _SOURCE)
        train, val = (
            self._read_list(folder / name, size or task.test) for name, size in _LISTS[self.split]
        )
        drop_broken_images(folder, [train.files, val.files])
        classes = tuple(f"class {number}" for number in range(task.classes))
        return Splits(train=train, val=val, classes=classes)

    def _read_list(self, path: Path, size: int) -> ImageFiles:
        last = VTAB_TASKS[self.task].classes - 1
        files = [
            (require_image(path.parent / name, place), parse_number(label, "label", 0, last, place))
            for place, name, label in read_two_columns(path, "images/1.jpg 0", _SOURCE)
        ]
        check_count(f"number of images in {path}", len(files), size, strict=self.check)
        return ImageFiles(files)
