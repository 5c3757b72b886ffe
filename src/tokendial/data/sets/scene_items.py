"""Real items and backgrounds, and how scenes are composed of them.

Items are from Fashion-MNIST (Xiao et al., https://arxiv.org/abs/1708.07747), backgrounds are
public-domain photographs from scikit-image.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ITEMS = ("T-shirt", "trouser", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "boot")  # fmt: skip
"""Kinds of items; the index is the label of Fashion-MNIST."""
_ITEM_SIDE = 28
_NUM_VAL_ITEMS = 5000
_GREY_LEVELS = np.arange(256, dtype=np.float32)
# Opacity and brightness of an item's pixel by its grey level. Brightness starts at 40, so that dark
# garments stay visible.
OPACITY = np.minimum(_GREY_LEVELS / 48.0, 1.0)
_BRIGHTNESS = 40.0 + 0.84 * _GREY_LEVELS


def crop_background(
    photos: Sequence[np.ndarray], side: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a random crop of a random photograph, [3, side, side] float32.

    Channels come first, because NumPy is slow over a last axis of length 3.
    """
    photo = photos[int(rng.integers(len(photos)))]
    top, left = (rng.integers(n - side + 1) for n in photo.shape[:2])
    photo = photo[top : top + side, left : left + side]
    photo = photo[:, :: 1 if rng.random() < 0.5 else -1]
    scene = np.ascontiguousarray(photo.transpose(2, 0, 1), np.float32)
    scene *= rng.uniform(0.5, 1.0)
    return scene


def paste_item(
    scene: np.ndarray, item: np.ndarray, y: int, x: int, rng: np.random.Generator
) -> None:
    """Draw an item [size, size] into a scene, in place, with a random tint and brightness."""
    tint = rng.uniform(0.7, 1.0, 3) * rng.uniform(0.7, 1.0)
    window = scene[:, y : y + item.shape[0], x : x + item.shape[1]]
    window += OPACITY[item] * (_BRIGHTNESS[item] * tint[:, None, None] - window)


def to_pixels(scene: np.ndarray) -> np.ndarray:
    """Return a scene [3, side, side] float32 as [side, side, 3] uint8."""
    return np.ascontiguousarray(scene.transpose(1, 2, 0).astype(np.uint8))


def resize_items(items: np.ndarray, side: int) -> np.ndarray:
    """Return items [N, H, W] uint8 resized to [N, side, side]."""
    tensor = torch.from_numpy(items.copy()).unsqueeze(1).float()
    small = torch.nn.functional.interpolate(tensor, (side, side), mode="bilinear", antialias=True)
    return small.squeeze(1).round().clamp(0, 255).byte().numpy()


@lru_cache(maxsize=2)
def load_items(items: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return items [N, 28, 28] uint8, bright on black, and their kinds [N].

    Args:
        items: "shipped", or a folder with Fashion-MNIST's gzipped IDX files.
        split: "train" or "val"; no item is in both.

    Raises:
        ValueError: If the folder does not hold Fashion-MNIST's training files.
    """
    if items == "shipped":
        assets = files("tokendial") / "assets"
        labels = np.array(json.loads((assets / f"items_{split}.json").read_text()))
        with (assets / f"items_{split}.png").open("rb") as file:
            sheet = np.asarray(Image.open(file))
        side = _ITEM_SIDE
        grid = sheet.reshape(sheet.shape[0] // side, side, sheet.shape[1] // side, side)
        return grid.swapaxes(1, 2).reshape(-1, side, side), labels
    part = slice(None, -_NUM_VAL_ITEMS) if split == "train" else slice(-_NUM_VAL_ITEMS, None)
    folder = Path(items)
    images = _read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = _read_idx(folder / "train-labels-idx1-ubyte.gz")
    if images.shape != (len(labels), _ITEM_SIDE, _ITEM_SIDE) or set(labels[part].tolist()) != set(
        range(10)
    ):
        raise ValueError(
            f"data.items: {folder} must hold labelled 28x28 items, with all ten kinds both among "
            f"the last {_NUM_VAL_ITEMS:,} and among the others, got images {images.shape}, "
            f"labels {labels.shape}."
        )
    return images[part], labels[part]


def _read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped IDX file of unsigned bytes."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        raise ValueError(
            f"data.items: {path} is missing or unreadable; Debian's package dataset-fashion-mnist "
            f"installs Fashion-MNIST in /usr/share/datasets/fashion-mnist."
        ) from None
    header = 4 + 4 * int.from_bytes(data[3:4], "big")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if data[:3] != b"\0\0\x08" or len(data) != header + math.prod(shape):
        raise ValueError(f"data.items: {path} is not an IDX file of unsigned bytes.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


@lru_cache(maxsize=1)
def load_backgrounds() -> tuple[np.ndarray, ...]:
    """Return the shipped photographs, each [H, W, 3] uint8."""
    folder = files("tokendial") / "assets" / "backgrounds"
    photos = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        with entry.open("rb") as file:
            photos.append(np.asarray(Image.open(file).convert("RGB")))
    return tuple(photos)
