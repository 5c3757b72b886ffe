"""Using a finished run on images or videos without labels: classes, or masks written as files."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import ImageError, count_pictures, read_image, warn_of_several
from tokendial.data.readers.video import VideoError, VideoFile
from tokendial.data.sets.shards import ShardImage
from tokendial.model.dial_vit import DialViT
from tokendial.runs.evaluate import default_device
from tokendial.runs.run import Run
from tokendial.tasks import BinaryMasks, Classification, Segmentation, VideoClassification
from tokendial.tasks.dense import best_class, frame_of, resize_map, slide
from tokendial.tune import OptimizedViT, SpeedSettings, apply_speed

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


Source = Path | ShardImage
"""What a class is predicted of: an image or video file, or an image in a shard."""
Answer = Prediction | ImageError | VideoError
"""What comes of a source: an error if it cannot be read."""


class Predictor:
    """Classes of images or videos by the best model of a run."""

    def __init__(
        self,
        run: Run,
        *,
        degree: int | None = None,
        top: int = 1,
        batch_size: int = 32,
        device: str | None = None,
        speed: SpeedSettings | None = None,
    ) -> None:
        """Load the model; see `predict`.

        Raises:
            ValueError: If the run has no model or learns masks, or `degree` or `top` is not there.
        """
        self.device, self.top = device or default_device(), top
        model = run.model().to(self.device)
        if degree is not None:
            model.set_degree(degree)
        self.classes, task = run.classes(), run.task()
        if not isinstance(task, Classification):
            raise ValueError(
                f"{run.folder} predicts masks, not classes: give a folder for them (--out)."
            )
        if not 1 <= top <= len(self.classes):
            raise ValueError(f"top must lie in [1, {len(self.classes)}] (classes), got {top}.")
        self.task = task
        self.batch = task.eval_batch(batch_size)
        """Sources that go together through the model."""
        self._transform = task.image_transform(model.anatomy)
        self.model: DialViT | OptimizedViT = model
        if speed:
            example = torch.zeros(self.batch, *model.anatomy.input_shape, device=self.device)
            self.model = apply_speed(model, example, speed, [model.degree])
        self._of_videos = isinstance(task, VideoClassification)
        self._value_range = run.value_range()

    @torch.no_grad()
    def __call__(self, sources: Sequence[Source]) -> list[Answer]:
        """Classes of each, most probable first."""
        read = [self._read(source) for source in sources]
        seen = [tensor for tensor in read if isinstance(tensor, Tensor)]
        if not seen:
            return [entry for entry in read if not isinstance(entry, Tensor)]
        logits = self.task.predict(self.model, torch.stack(seen).to(self.device)).float()
        likely = iter(zip(*self.task.probabilities(logits).topk(self.top), strict=True))
        answers: list[Answer] = []
        for source, entry in zip(sources, read, strict=True):
            if not isinstance(entry, Tensor):
                answers.append(entry)
                continue
            values, indices = next(likely)
            names = tuple(self.classes[index] for index in indices.tolist())
            answers.append(Prediction(str(source), names, tuple(values.tolist())))
        return answers

    def _read(self, source: Source) -> Tensor | ImageError | VideoError:
        try:
            if isinstance(source, ShardImage):
                return self._transform(source.read(self._value_range))
            if self._of_videos:
                return self._transform(VideoFile(source))
            image = read_image(source, self._value_range)
            warn_of_several([(source, count_pictures(source))])
            return self._transform(image)
        except (ImageError, VideoError) as error:
            return error


def predict(
    run: Run,
    sources: Iterable[Source],
    *,
    degree: int | None = None,
    top: int = 1,
    batch_size: int = 32,
    device: str | None = None,
    speed: SpeedSettings | None = None,
) -> Iterator[Answer]:
    """Classes of images or videos, in order; one that cannot be read gives its error instead.

    Args:
        run: A run with a model.
        sources: Image files and images in shards, or video files for a run on videos.
        degree: Degree of the dial; None: the one that the model was trained at.
        top: How many classes to give for each.
        batch_size: Images, or views of videos, per forward pass.
        device: Where to compute; None: the accelerator if there is one.
        speed: What to do for it first.
    """
    predictor = Predictor(
        run, degree=degree, top=top, batch_size=batch_size, device=device, speed=speed
    )
    left = iter(sources)
    while some := list(islice(left, predictor.batch)):
        yield from predictor(some)


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
    files = list(files)
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
    transform, value_range = task.image_transform(model.anatomy), run.value_range()
    taken: Counter[str] = Counter()
    for path in files:
        try:
            image = read_image(path, value_range)
        except ImageError as error:
            yield error
            continue
        warn_of_several([(path, count_pictures(path))])
        if tiles:
            logits = _in_tiles(model, image, task.augment.stride, on)
        else:
            logits = task.predict(model, transform(image).unsqueeze(0).to(on))[0].float()
        size = image.height, image.width
        mask = mask_image(task, logits, size)
        taken[path.stem] += 1
        stem = path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"
        target, over = out / f"{stem}.png", out / f"{stem}.overlay.png"
        _write(mask, target)
        if overlay:
            _write(_overlaid(image, mask), over)
        share = mask_share(task, mask)
        yield MaskFile(str(path), str(target), str(over) if overlay else None, share)


def mask_image(
    task: BinaryMasks | Segmentation, logits: Tensor, size: tuple[int, int]
) -> Image.Image:
    """The mask that logits [K, h, w] stand for, at another size.

    Grey levels of one class's probabilities, or indices of several classes with a palette.
    """
    return _probabilities(logits, size) if isinstance(task, BinaryMasks) else _classes(logits, size)


def mask_share(task: BinaryMasks | Segmentation, mask: Image.Image) -> float:
    """Share of the pixels that lie inside, or that are of any class but the first."""
    threshold = 127 if isinstance(task, BinaryMasks) else 0
    return float((np.asarray(mask) > threshold).mean())


def _probabilities(logits: Tensor, size: tuple[int, int]) -> Image.Image:
    """The mask of one class, as grey levels."""
    grey = resize_map(logits.sigmoid().unsqueeze(0), size)[0, 0].mul_(255).round_()
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
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
