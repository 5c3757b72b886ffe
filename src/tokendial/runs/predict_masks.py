"""Prediction of masks, written as PNG files, by the best model of a run."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import (
    ImageError,
    count_pictures,
    read_image,
    warn_of_multi_picture_files,
)
from tokendial.model.windows import predict_windows
from tokendial.runs.answering import AnsweringModel
from tokendial.runs.mask_images import mask_image, mask_share, overlay_mask
from tokendial.runs.run import Run
from tokendial.runtimes import PLAIN, Runtime
from tokendial.tasks import BinaryMasks, Embeddings, Segmentation
from tokendial.tasks.dense_prediction import input_format

_MAX_LOGIT_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class MaskFile:
    """The predicted mask of one image, written to a file."""

    path: str
    """Path of the image file."""
    mask: str
    """Path of the mask: a PNG file of the image's size. It holds the probability as grey level, or
    class indices with a palette."""
    overlay: str | None
    """Path of the PNG file that shows the image under its mask. None if it was not requested."""
    share: float
    """Fraction of the pixels inside the mask, or of any class but the first, in [0, 1]."""
    degree: int
    """Degree of the dial that answered."""


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
    runtime: Runtime = PLAIN,
    cascade: bool = False,
    compensator: str | Path | None = None,
) -> Iterator[MaskFile | ImageError]:
    """Predict the masks of images and write them to `out`, one answer per file, in their order.

    A file that cannot be read does not end the prediction: its answer is the error.

    Args:
        run: A run on masks, with a model.
        files: Image files.
        out: Folder for `NAME.png`, made if it is missing. Images of the same name get a number.
        degree: Degree of the dial. None means the degree that the model was trained at.
        overlay: Whether to write `NAME.overlay.png` as well: the image under its mask.
        tiles: Whether to run the model on overlapping windows of the image at its own resolution,
            instead of resizing it. Use this for small objects in large images.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        runtime: Where and how the model computes.
        cascade: Answer by the run's cascade, which `calibrate_cascade` writes, at no one degree.
        compensator: Folder of a compensator, which adapts the model to the degree. None: without.

    Raises:
        ValueError: If the run predicts no masks, the compensator does not fit it, the degree is not
            offered, the run has no cascade that fits where one is asked for, `tiles` are asked of
            it, images lie in `out` itself, or the logits of an image in windows would take more
            than 2 GiB.
    """
    task = run.task()
    if not isinstance(task, BinaryMasks | Segmentation):
        given = "embeddings" if isinstance(task, Embeddings) else "classes"
        raise ValueError(f"{run.folder} predicts {given}, not masks.")
    files = list(files)
    # A mask could overwrite an image that has its name.
    if in_out := [path for path in files if path.parent.resolve() == out.resolve()]:
        raise ValueError(
            f"out must be another folder than that of the images, {in_out[0]} is in it."
        )
    if tiles and cascade:
        raise ValueError("cascade answers whole images: it cannot be combined with tiles.")
    answer = AnsweringModel(
        run,
        degree=degree,
        device=device,
        runtime=runtime,
        cascade=cascade,
        compensator=compensator,
    )
    out.mkdir(parents=True, exist_ok=True)
    transform, value_range = task.image_transform(answer.anatomy), run.value_range()
    names: Counter[str] = Counter()
    for path in files:
        try:
            image = read_image(path, value_range)
        except ImageError as error:
            yield error
            continue
        warn_of_multi_picture_files([(path, count_pictures(path))])
        if tiles:
            logits = _logits_in_tiles(answer, image, task)
            answered = answer.model.degree
        else:
            (logits,), (answered,) = answer(transform(image).unsqueeze(0))
        mask = mask_image(task, logits, (image.height, image.width))
        names[path.stem] += 1
        stem = path.stem if names[path.stem] == 1 else f"{path.stem}-{names[path.stem]}"
        mask_path, overlay_path = out / f"{stem}.png", out / f"{stem}.overlay.png"
        _write_png(mask, mask_path)
        if overlay:
            _write_png(overlay_mask(image, mask), overlay_path)
        share = mask_share(task, mask)
        shown = str(overlay_path) if overlay else None
        yield MaskFile(str(path), str(mask_path), shown, share, answered)


def _logits_in_tiles(
    answer: AnsweringModel, image: Image.Image, task: BinaryMasks | Segmentation
) -> Tensor:
    """Logits [K, H, W] at the resolution of the image, enlarged to one window if it is smaller."""
    window = answer.anatomy.image_size
    height, width = max(image.height, window[0]), max(image.width, window[1])
    needed = 4 * task.num_classes * height * width
    if needed > _MAX_LOGIT_BYTES:
        raise ValueError(
            f"tiles: the logits of {width} x {height} pixels and {task.num_classes} classes take "
            f"{needed / 2**30:.1f} GiB, at most {_MAX_LOGIT_BYTES / 2**30:.0f} are allowed; "
            "predict without tiles."
        )
    pixels = input_format(answer.anatomy).normalise(image.resize((width, height)))
    images = pixels.unsqueeze(0).to(answer.device)
    return predict_windows(answer.model, images, window, task.augment.stride)[0].float()


def _write_png(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
