"""Using a finished run on images or videos without labels: classes, or masks written as files."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokendial.atomic import replacing
from tokendial.data.images import ImageError, read_image
from tokendial.data.transforms import Transform
from tokendial.data.video import VideoError, VideoFile
from tokendial.tasks import BinaryMasks, Classification, Segmentation, VideoClassification
from tokendial.tasks.dense import best_class, frame_of, sized, slide
from tokendial.train.evaluate import default_device
from tokendial.train.runs import Run
from tokendial.vit import DialViT

_TINT, _TINTED = np.array([255, 40, 40], np.float32), 0.6
_BAND = 256
_MOST_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Prediction:
    """Classes of one image or video, most probable first."""

    path: str
    """The file."""
    classes: tuple[str, ...]
    """Names of the classes."""
    probabilities: tuple[float, ...]
    """Their probabilities."""


@dataclass(frozen=True, slots=True)
class MaskFile:
    """The mask of one image, written to a file."""

    path: str
    """The image file."""
    mask: str
    """PNG of the image's size: probabilities as grey levels, or class indices with a palette."""
    overlay: str | None
    """PNG of the image under its mask, if it was asked for."""
    share: float
    """Share of the pixels that lie inside, or that are of any class but the first."""


@torch.no_grad()
def predict(
    run: Run,
    files: Iterable[Path],
    *,
    degree: int | None = None,
    top: int = 1,
    batch_size: int = 32,
    device: str | None = None,
) -> Iterator[Prediction | ImageError | VideoError]:
    """Classes of images or videos, in order; a file that cannot be read gives its error instead.

    Args:
        run: A run with a model.
        files: Image files, or video files for a run on videos.
        degree: Degree of the dial; None: the one that the model was trained at.
        top: How many classes to give for each file.
        batch_size: Images, or views of videos, per forward pass.
        device: Where to compute; None: the accelerator if there is one.
    """
    on = device or default_device()
    model = run.model().to(on)
    if degree is not None:
        model.set_degree(degree)
    classes, task = run.classes(), run.task()
    if not isinstance(task, Classification):
        raise ValueError(
            f"{run.folder} predicts masks, not classes: give a folder for them (--out)."
        )
    if not 1 <= top <= len(classes):
        raise ValueError(f"top must lie in [1, {len(classes)}] (classes), got {top}.")
    transform = task.image_transform(model.anatomy)
    opened = VideoFile if isinstance(task, VideoClassification) else read_image

    left = iter(files)
    while some := list(islice(left, task.eval_batch(batch_size))):
        read = [_read(path, opened, transform) for path in some]
        seen = [tensor for tensor in read if isinstance(tensor, Tensor)]
        if seen:
            logits = task.predict(model, torch.stack(seen).to(on)).float()
        else:
            logits = torch.empty(0, top)
        likely = iter(zip(*task.probabilities(logits).topk(top), strict=True))
        for path, entry in zip(some, read, strict=True):
            if not isinstance(entry, Tensor):
                yield entry
                continue
            values, indices = next(likely)
            names = tuple(classes[index] for index in indices.tolist())
            yield Prediction(str(path), names, tuple(values.tolist()))


def _read(
    path: Path, opened: Callable[[Path], Any], transform: Transform
) -> Tensor | ImageError | VideoError:
    try:
        return transform(opened(path))
    except (ImageError, VideoError) as error:
        return error


@torch.no_grad()
def predict_masks(
    run: Run,
    files: Iterable[Path],
    out: Path,
    *,
    degree: int | None = None,
    overlay: bool = False,
    tiles: bool = False,
    device: str | None = None,
) -> Iterator[MaskFile | ImageError]:
    """Masks of images, in order, written to `out`; a file that cannot be read gives its error.

    Args:
        run: A run of a dense task, with a model.
        files: Image files.
        out: Folder for `NAME.png`, made if it is missing; images of the same name get a number.
        degree: Degree of the dial; None: the one that the model was trained at.
        overlay: Write `NAME.overlay.png` as well.
        tiles: Run on windows that overlap at the resolution of the image itself, instead of an
            image that was resized; for large images with small things.
        device: Where to compute; None: the accelerator if there is one.

    Raises:
        ValueError: If the run predicts classes, the degree is not offered, images lie in `out`
            itself, or the logits of an image would not fit in memory.
    """
    task = run.task()
    if not isinstance(task, BinaryMasks | Segmentation):
        raise ValueError(f"{run.folder} predicts classes, not masks.")
    binary, files = isinstance(task, BinaryMasks), list(files)
    # A mask could take the place of an image that has its name.
    if beside := [path for path in files if path.parent.resolve() == out.resolve()]:
        raise ValueError(
            f"out must be another folder than that of the images, {beside[0]} is in it."
        )
    on = device or default_device()
    model = run.model().to(on)
    if degree is not None:
        model.set_degree(degree)
    out.mkdir(parents=True, exist_ok=True)
    transform = task.image_transform(model.anatomy)
    taken: Counter[str] = Counter()
    for path in files:
        try:
            image = read_image(path)
        except ImageError as error:
            yield error
            continue
        if tiles:
            logits = _in_tiles(model, image, task.augment.stride, on)
        else:
            logits = task.predict(model, transform(image).unsqueeze(0).to(on))[0].float()
        size = image.height, image.width
        mask = _probabilities(logits, size) if binary else _classes(logits, size)
        taken[path.stem] += 1
        stem = path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"
        target, over = out / f"{stem}.png", out / f"{stem}.overlay.png"
        _write(mask, target)
        if overlay:
            _write(_overlaid(image, mask), over)
        inside = float((np.asarray(mask) > (127 if binary else 0)).mean())
        yield MaskFile(str(path), str(target), str(over) if overlay else None, inside)


def _probabilities(logits: Tensor, size: tuple[int, int]) -> Image.Image:
    """The mask of one class, as grey levels."""
    grey = sized(logits.sigmoid().unsqueeze(0), size)[0, 0].mul_(255).round_()
    return Image.fromarray(grey.byte().cpu().numpy())


def _classes(logits: Tensor, size: tuple[int, int]) -> Image.Image:
    """The mask of several classes, by a palette."""
    mask = Image.fromarray(best_class(logits, size).cpu().numpy())
    mask.putpalette(_palette().flatten().tolist())
    return mask


def _overlaid(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, tinted where the mask is."""
    by_class = mask.mode == "P"
    colours = _palette() if by_class else np.broadcast_to(_TINT, (256, 3))
    levels = np.arange(256) > 0 if by_class else np.arange(256) / 255
    share = (_TINTED * levels[:, None]).astype(np.float32)
    # For each value of the mask: how much is left of the image, and what is added to it.
    left, added = 1 - share, colours * share
    pixels, values = np.array(image), np.asarray(mask)
    # In bands, since numbers with a fraction take four times the room of a large photograph.
    for top in range(0, len(pixels), _BAND):
        band, of = pixels[top : top + _BAND], values[top : top + _BAND]
        band[:] = band * left[of] + added[of]
    return Image.fromarray(pixels)


def _in_tiles(model: DialViT, image: Image.Image, stride: float, device: str) -> Tensor:
    """Logits [K, H, W] at the resolution of the image, or of the model if it is smaller."""
    window = model.anatomy.image_size
    height, width = max(image.height, window[0]), max(image.width, window[1])
    needed = 4 * model.num_classes * height * width
    if needed > _MOST_BYTES:
        raise ValueError(
            f"tiles: the logits of {width} x {height} pixels and {model.num_classes} classes take "
            f"{needed / 2**30:.1f} GiB, at most {_MOST_BYTES / 2**30:.0f} are allowed; predict "
            "without tiles."
        )
    seen = frame_of(model.anatomy).finish(image.resize((width, height)))
    return slide(model, seen.unsqueeze(0).to(device), window, stride)[0]


def _palette() -> np.ndarray:
    """256 colours [256, 3] uint8, the first one black."""
    colours: np.ndarray = matplotlib.colormaps["tab20"](np.arange(256) % 20)[:, :3]
    colours[0] = 0
    return (colours * 255).round().astype(np.uint8)


def _write(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
