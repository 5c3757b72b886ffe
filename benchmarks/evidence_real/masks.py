"""Masks of single pictures: how good they are, and how much they overlap with other masks."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokendial as td
from benchmarks.evidence_real.common import Options
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from tokendial.data.readers.images import read_image
from tokendial.measure import Interval, Resampling
from tokendial.runs.recipe import check_method
from tokendial.tasks import BinaryMasks
from tokendial.tasks.dense_prediction import resize_maps
from tokendial.tasks.metrics import MaskMetrics

IMG_SIZE = 224
SQUARES = 3
"""Pictures that are cut from each photograph."""
MEASURES = ("s_measure", "mean_f", "weighted_f", "mae")
_BATCH = 16
_SCENERY = (
    "/usr/share/backgrounds/mate/nature/*.jpg",
    "/usr/share/backgrounds/mate/abstract/Elephants.jpg",
    "/usr/share/wallpapers/*/contents/images/2560x1600.jpg",
)
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def photographs() -> list[Path]:
    """Photographs of Debian's packages of backgrounds, and those in scikit-image."""
    import skimage

    found = [path for pattern in _SCENERY for path in sorted(Path("/").glob(pattern[1:]))]
    return found + [Path(skimage.__file__).parent / "data" / name for name in _SKIMAGE]


def squares() -> Iterator[Image.Image]:
    """The left (or top), middle and right (or bottom) square of each photograph."""
    for path in photographs():
        photograph = read_image(path)
        side = min(photograph.size)
        for part in range(SQUARES):
            left, top = ((length - side) * part // (SQUARES - 1) for length in photograph.size)
            yield photograph.crop((left, top, left + side, top + side))


def test_pairs(options: Options) -> Any:
    """Test pictures of Cutouts with their masks; objects and backgrounds are those of no other."""
    return _splits(options).val


def training_pairs(options: Options) -> Any:
    """Training pictures of Cutouts with their masks."""
    return _splits(options).train


def _splits(options: Options) -> Any:
    data = check_method("data", {"name": "pairs", "root": str(options.cutouts), "val": "test"})
    return data.build(0)


@torch.inference_mode()
def predict_masks(
    model: td.DialViT, task: BinaryMasks, samples: Iterable[tuple[Image.Image, np.ndarray | None]]
) -> dict[str, np.ndarray]:
    """Predict masks.

    Args:
        model: The model, at the degree to predict at.
        task: Prepares the pictures.
        samples: Pictures with their masks. Without a mask, the picture has no scores.

    Returns:
        scores: [pictures, MEASURES], NaN without a mask; masks: [pictures, bytes], 1 bit for each
        pixel of `IMG_SIZE` x `IMG_SIZE`.
    """
    model.eval()
    transform = task.image_transform(model.anatomy)
    scores, masks, left = [], [], iter(samples)
    while batch := list(itertools.islice(left, _BATCH)):
        images = torch.stack([transform(image) for image, _ in batch])
        logits = task.predict(model, images).float()
        scores += [_scores(logits[i : i + 1], target) for i, (_, target) in enumerate(batch)]
        inside = resize_maps(logits, (IMG_SIZE, IMG_SIZE))[:, 0] > 0
        masks.append(np.packbits(inside.flatten(1).numpy(), axis=1))
    return {"scores": np.array(scores), "masks": np.concatenate(masks)}


def _scores(logits: Tensor, target: np.ndarray | None) -> list[float]:
    if target is None:
        return [np.nan] * len(MEASURES)
    metrics = MaskMetrics()
    metrics.update(logits, [torch.from_numpy(target)])
    found = metrics.compute()
    return [float(found[name]) for name in MEASURES]


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of masks, [pictures]; NaN where both masks are empty.

    Args:
        first: Masks as `predict_masks` returns them.
        second: Masks of the same pictures.
    """
    common = np.unpackbits(first & second, axis=1).sum(axis=1, dtype=np.int64)
    either = np.unpackbits(first | second, axis=1).sum(axis=1, dtype=np.int64)
    return np.where(either > 0, common / np.maximum(either, 1), np.nan)


def over_pictures(by_seed: Sequence[np.ndarray]) -> Interval:
    """Mean of a value for each seed and picture, with its interval; values of NaN are left out."""
    draws = _resampling(len(by_seed[0]), len(by_seed))
    return interval(resampled_scores(draws, mean, by_seed, np.zeros(len(by_seed[0]))))


_resampling = functools.cache(Resampling)


def score_intervals(
    scores: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> dict[str, Interval]:
    """Each of `MEASURES` with its interval, and "MEASURE, difference": the paired difference.

    Args:
        scores: For each seed [pictures, MEASURES].
        reference: The scores to subtract, of the same seeds and pictures.
    """
    found = {}
    for column, name in enumerate(MEASURES):
        own = [of_seed[:, column] for of_seed in scores]
        other = [of_seed[:, column] for of_seed in reference]
        found[name] = over_pictures(own)
        found[f"{name}, difference"] = over_pictures(
            [a - b for a, b in zip(own, other, strict=True)]
        )
    return found
