"""Published layouts of data sets with masks of classes, for evaluation by class names.

Each layout is the one that the data set is unpacked to, or that its common preparation writes:
PASCAL VOC and Context as in VOCdevkit, Cityscapes with the masks of train ids, ADE20K as in the
scene parsing challenge. COCO-Stuff has the masks of 171 train ids beside its images, COCO-Object
those of the 80 things plus background.
"""

from typing import Any

from tokendial.data.sets.pairs import Pairs
from tokendial.open_vocabulary import CLASS_LISTS, class_list

_VOC: dict[str, Any] = {
    "images": "JPEGImages",
    "annotations": "SegmentationClass",
    "lists": "ImageSets/Segmentation",
    "train": "train",
    "val": "val",
}
_CONTEXT = _VOC | {
    "annotations": "SegmentationClassContext",
    "lists": "ImageSets/SegmentationContext",
}
_COCO: dict[str, Any] = {"train": "train2017", "val": "val2017"}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "voc20": _VOC | {"ignore_zero": True},
    "voc21": _VOC,
    "context59": _CONTEXT | {"ignore_zero": True},
    "context60": _CONTEXT,
    "coco_object": _COCO | {"mask_suffix": "_instanceTrainIds"},
    "coco_stuff": _COCO | {"mask_suffix": "_labelTrainIds"},
    "cityscapes": {
        "images": "leftImg8bit",
        "annotations": "gtFine",
        "train": "train",
        "val": "val",
        "image_suffix": "_leftImg8bit",
        "mask_suffix": "_gtFine_labelTrainIds",
    },
    "ade20k": {"ignore_zero": True},
}


def class_mask_pairs(name: str, root: str) -> Pairs:
    """Return the settings that read a data set in its published layout.

    Classes are in the order of `class_list(name)`. Without background (voc20, context59), value 0
    of a mask is ignored.

    Args:
        name: One of `CLASS_LISTS`.
        root: Folder of the data set, such as VOCdevkit/VOC2012.

    Raises:
        ValueError: If there is no such layout.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"data must be one of {', '.join(CLASS_LISTS)}, got {name!r}.")
    classes = [names[0] for names in class_list(name)]
    return Pairs(root=root, classes=classes, **_LAYOUTS[name])
