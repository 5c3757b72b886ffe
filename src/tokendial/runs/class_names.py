"""Masks of classes that are given by names: prediction on image files, and evaluation."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import ImageError, read_image
from tokendial.data.sets.pairs import PairSet
from tokendial.open_vocabulary import ProxyCLIP
from tokendial.runs.mask_images import class_image, legend_image
from tokendial.tasks.metrics import PixelMetrics

MASK_ENDINGS = (".mask.png", ".classes.png")
"""Ends of the names of the files that `predict_class_names` writes for each image."""


@dataclass(frozen=True, slots=True)
class ClassMaskFiles:
    """The predicted mask of one image, written to two files."""

    path: str
    """Path of the image file."""
    mask: str
    """Path of the mask, a PNG file of the image's size with class indices and a palette."""
    picture: str
    """Path of the PNG file that shows the image, its mask and the names of the colours."""
    shares: dict[str, float]
    """Fraction of the pixels by the first name of each class that occurs, largest first."""


def predict_class_names(
    model: ProxyCLIP, files: Iterable[Path], out: Path | None = None
) -> Iterator[ClassMaskFiles | ImageError]:
    """Predict the masks of images and write NAME.mask.png and NAME.classes.png for each.

    Images of the same name get a number. A file that cannot be read does not end the prediction:
    its answer is the error.

    Args:
        model: A model with classes.
        files: Image files.
        out: Folder to write to, made if it is missing; None: beside each image.

    Raises:
        ValueError: If there are more than 255 classes, for which the palette has no colours.
    """
    if len(model.classes) > 255:
        raise ValueError(f"classes must be at most 255 for masks, got {len(model.classes)}.")
    written: Counter[Path] = Counter()
    names = [each[0] for each in model.classes]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for path in files:
        try:
            image = read_image(path, None)
        except ImageError as error:
            yield error
            continue
        indices = model.predict(_to_batch(image, model))[0].byte().cpu().numpy()
        counts = np.bincount(indices.ravel(), minlength=len(names))
        present = [number for number in np.argsort(-counts, kind="stable") if counts[number]]
        stem = (path.parent if out is None else out) / path.stem
        written[stem] += 1
        if written[stem] > 1:
            stem = stem.with_name(f"{path.stem}-{written[stem]}")
        # One colour further, because the first one is black, which looks like no class.
        legend = {int(number) + 1: names[number] for number in present}
        picture = legend_image(image, class_image(indices + 1), legend)
        mask_path, picture_path = (
            stem.with_name(f"{stem.name}{ending}") for ending in MASK_ENDINGS
        )
        for target, content in ((mask_path, class_image(indices)), (picture_path, picture)):
            with atomic_write(target) as temporary:
                content.save(temporary, format="PNG")
        shares = {names[n]: float(counts[n] / indices.size) for n in present}
        yield ClassMaskFiles(str(path), str(mask_path), str(picture_path), shares)


def evaluate_class_names(
    model: ProxyCLIP, pairs: PairSet, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, float]:
    """Return mean IoU, pixel accuracy and the IoU of each class.

    Args:
        model: A model with the classes of the masks, in their order.
        pairs: Images with masks of class indices.
        progress: Called after each image with the number of images so far, the number of all, and
            a text.
    """
    metrics = PixelMetrics(len(model.classes))
    for index in range(len(pairs)):
        image, mask = pairs[index]
        predicted = model.predict(_to_batch(image, model)).cpu()
        metrics.update(predicted, torch.from_numpy(mask).unsqueeze(0))
        if progress is not None:
            progress(index + 1, len(pairs), f"degree {model.degree}")
    return {name: float(value) for name, value in metrics.compute().items()}


def _to_batch(image: Image.Image, model: ProxyCLIP) -> Tensor:
    """An image as a batch [1, 3, H, W] of values in [0, 1], on the device of the model."""
    like = next(model.parameters())
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(like.device)
    return pixels.permute(2, 0, 1).unsqueeze(0).to(like.dtype) / 255
