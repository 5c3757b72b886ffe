"""Training images of a run without augmentation: what fits and 8-bit files are calibrated on."""

from typing import Any

import torch
from torch import Tensor

from tokendial.data.transforms.image import Transform
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.tasks import Task, VideoClassification
from tokendial.tasks.dense_prediction import DensePrediction

_NUM_CALIBRATION = 128
"""Images that the ranges of activations are found on."""


def training_images(run: Run, model: DialViT, *, count: int, seed: int = 0) -> Tensor:
    """At most `count` random training images [N, 3, H, W], or clips [N, T, 3, H, W].

    Args:
        run: The run.
        model: Its model.
        count: Number of images, at least 1.
        seed: Seed of the random choice.

    Raises:
        ValueError: If the run's data set is missing, or has changed since training.
    """
    train: Any = run.data().train
    prepare = fixed_size_transform(run.task(), model)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([prepare(train[index][0]) for index in chosen.tolist()])


def calibration_images(run: Run, model: DialViT) -> Tensor:
    """The training images that `Runtime.start` calibrates a run's model on.

    Raises:
        ValueError: If there are none.
    """
    try:
        return training_images(run, model, count=_NUM_CALIBRATION)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"int8 in openvino is calibrated on training images of {run.folder}: {error}"
        ) from error


def fixed_size_transform(task: Task, model: DialViT) -> Transform:
    """How images are prepared so that all have one size.

    Of a video it is the middle clip. Of a task that sees windows, it is the window in the middle.
    """
    if isinstance(task, VideoClassification):
        return task.clip_transform(model.anatomy)
    prepare = task.image_transform(model.anatomy)
    if not isinstance(task, DensePrediction):
        return prepare
    height, width = model.anatomy.image_size

    def window(image: Any) -> Tensor:
        prepared = prepare(image)
        top, left = (prepared.shape[1] - height) // 2, (prepared.shape[2] - width) // 2
        return prepared[:, top : top + height, left : left + width]

    return window
