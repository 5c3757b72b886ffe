"""Facts about the model of a run, which exported files hold."""

from dataclasses import asdict
from typing import Any

from tokendial.data.transforms.image import ResizeAndCrop
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.tasks import (
    BinaryMasks,
    Classification,
    Embeddings,
    Segmentation,
    VideoClassification,
)


def run_facts(run: Run, model: DialViT) -> dict[str, Any]:
    """Describe the classes of a run's model, and how to prepare its images.

    Returns:
        `task`: classification (softmax), multi_label (sigmoid), video_classification, binary_masks
        (sigmoid), segmentation, or embeddings, which take the place of logits. `classes`: names in
        the order of the logits. `short_side`: the pixels that images are resized to, in their
        proportions; null: to height and width of `input`, whatever their shape. `interpolation`:
        Pillow's. `crop`: height and width of the part in the middle; null: all. `divide_by`: 8-bit
        values by this, before `mean` and `std`. `range`: values of black and white in files of more
        than 8 bits; null: the ends of their type. Tasks that look at windows or views say so under
        `windows` and `clip`; then sides are resized until both cover `input`.
    """
    task = run.task()
    facts: dict[str, Any] = {"task": "", "classes": list(run.classes()), "divide_by": 255}
    facts["range"] = run.value_range()
    if isinstance(task, VideoClassification):
        facts |= {"task": "video_classification", "clip": asdict(task.clip)}
        return facts | {"interpolation": "bicubic", "short_side": None, "crop": None}
    if isinstance(task, Classification | Embeddings):
        transform: Any = task.image_transform(model.anatomy)
        resize = transform.transforms[0]
        cropped = isinstance(resize, ResizeAndCrop)
        return facts | {
            "task": _task_name(task),
            "interpolation": "bicubic",
            "short_side": resize.short if cropped else None,
            "crop": list(resize.size) if cropped else None,
        }
    assert isinstance(task, BinaryMasks | Segmentation)
    slides = task.augment.test == "slide"
    return facts | {
        "task": "binary_masks" if isinstance(task, BinaryMasks) else "segmentation",
        "interpolation": "bilinear",
        "short_side": None,
        "crop": None,
        "windows": {"stride": task.augment.stride} if slides else None,
    }


def _task_name(task: Classification | Embeddings) -> str:
    if isinstance(task, Embeddings):
        return "embeddings"
    return "multi_label" if task.multi_label else "classification"
