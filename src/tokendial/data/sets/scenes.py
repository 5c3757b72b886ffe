"""Dense scenes composed of real images: nine items on a photograph, no empty cell.

Every token matters in such a scene, so reducing tokens costs a model accuracy as it does on large
photographs. Items come from Fashion-MNIST (Xiao et al., https://arxiv.org/abs/1708.07747),
backgrounds from scikit-image's public-domain photographs.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from tokendial.data.splits import Splits
from tokendial.methods import register

ITEM_SIDES = (14, 16, 18)
ITEMS = ("T-shirt", "trouser", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "boot")  # fmt: skip
SNEAKER, BAG = ITEMS.index("sneaker"), ITEMS.index("bag")
CLASSES = {
    "present": ITEMS,
    "count": ("0", "1", "2", "3", "4"),
    "where": tuple(f"row {r} column {c}" for r in (1, 2, 3) for c in (1, 2, 3)),
    "which": ITEMS,
}
_HELD_OUT = 5000
_LEVELS = np.arange(256, dtype=np.float32)
# Opacity and shade of an item by its grey level; the floor keeps dark garments visible.
_MATTE, _SHADE = np.minimum(_LEVELS / 48.0, 1.0), 40.0 + 0.84 * _LEVELS
_SPLITS = ("train", "val")


@register("data", "scenes")
@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """Scenes of nine items, with one of four questions."""

    task: Literal["present", "count", "where", "which"] = "count"
    """present: which kinds of items are there (multi-label); count: how many sneakers, 0 to 4;
    where: in which cell the only bag is; which: the kind that is there three times."""
    items: str = "shipped"
    """"shipped" (3,000 items), or the folder with Fashion-MNIST's four gzipped IDX files, whose
    60,000 training items are used (the last 5,000 of them for validation)."""
    train_size: int = 2000
    """Scenes in the training set."""
    val_size: int = 1000
    """Scenes in the validation set."""
    img_size: int = 48
    """Side of a scene in pixels."""
    cells: int = 3
    """Rows and columns of items: 3, or 1 for a single item (with the task "which" only)."""

    def __post_init__(self) -> None:
        if self.task not in CLASSES:
            raise ValueError(f"task must be one of {', '.join(CLASSES)}, got {self.task!r}.")
        for name in ("train_size", "val_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.cells not in (1, 3) or (self.cells == 1 and self.task != "which"):
            raise ValueError(f"cells must be 3, or 1 with the task which, got {self.cells}.")
        smallest = max(16 * self.cells, ITEM_SIDES[-1])
        if not smallest <= self.img_size <= 160:
            raise ValueError(
                f"img_size must lie in [{smallest}, 160] with {self.cells} cells a side, "
                f"got {self.img_size}."
            )

    def build(self, seed: int) -> Splits:
        """The two sets; scene i of a set depends on (seed, set, i) alone.

        Raises:
            ValueError: If `items` is a folder without Fashion-MNIST's training files.
        """
        backgrounds = _backgrounds()
        sets = {
            split: SceneSet(
                *_load_items(self.items, split),
                backgrounds,
                task=self.task,
                num_scenes=self.train_size if split == "train" else self.val_size,
                seed=(seed, _SPLITS.index(split)),
                img_size=self.img_size,
                cells=self.cells,
            )
            for split in _SPLITS
        }
        return Splits(
            train=sets["train"],
            val=sets["val"],
            classes=CLASSES[self.task],
            multi_label=self.task == "present",
        )


class SceneSet(Dataset[tuple[Image.Image, Any]]):
    """Composes scene `i` when it is asked for."""

    def __init__(
        self,
        items: np.ndarray,
        labels: np.ndarray,
        backgrounds: Sequence[np.ndarray],
        *,
        task: str,
        num_scenes: int,
        seed: tuple[int, ...],
        img_size: int,
        cells: int,
    ) -> None:
        """Prepare the items.

        Args:
            items: [N, 28, 28] uint8, bright on black.
            labels: [N] kinds, 0 to 9.
            backgrounds: Photographs, [H, W, 3] uint8, larger than a scene.
            task: A key of `CLASSES`.
            num_scenes: Length of the set.
            seed: With the index of a scene, the seed of its random numbers.
            img_size: Side of a scene in pixels.
            cells: Rows and columns of items.
        """
        self.item_kinds, self.backgrounds = labels, backgrounds
        self.task, self.num_scenes, self.seed, self.img_size = task, num_scenes, seed, img_size
        self.cells = cells
        self.sprites = [_resized(items, side) for side in ITEM_SIDES]
        self.by_kind = [np.flatnonzero(labels == kind) for kind in range(len(ITEMS))]

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Scene `index` [img_size x img_size RGB] and its target."""
        rng = self._rng(index)
        kinds = _draw_kinds(self.task, rng, self.cells**2)
        return Image.fromarray(self._compose(kinds, rng)), _target(self.task, kinds)

    def layout(self, index: int) -> np.ndarray:
        """The kinds of items in the nine cells of scene `index`, row by row."""
        return _draw_kinds(self.task, self._rng(index), self.cells**2)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        return np.random.default_rng((*self.seed, index))

    def _compose(self, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.img_size
        scene = _background(self.backgrounds, side, rng)
        cell = side // self.cells
        for place, kind in enumerate(kinds):
            sprites = self.sprites[rng.integers(len(self.sprites))]
            candidates = self.by_kind[kind]
            item = sprites[candidates[rng.integers(len(candidates))]]
            item = item[:, :: 1 if rng.random() < 0.5 else -1]
            size = item.shape[0]
            spare = cell - size
            low, high = min(0, spare) - 1, max(0, spare) + 2
            y, x = (
                min(max(0, number * cell + int(rng.integers(low, high))), side - size)
                for number in divmod(place, self.cells)
            )
            _paste(scene, item, y, x, rng)
        return _finished(scene)


@register("data", "scene_masks")
@dataclass(frozen=True, kw_only=True, slots=True)
class SceneMasks:
    """One to three items on a photograph, with exact masks."""

    task: Literal["items", "kinds"] = "items"
    """items: which pixels belong to an item (binary); kinds: to which kind (0: none, 1 to 10)."""
    items: str = "shipped"
    """As for scenes."""
    train_size: int = 2000
    """Scenes in the training set."""
    val_size: int = 500
    """Scenes in the validation set."""
    img_size: int = 96
    """Side of a scene in pixels."""

    def __post_init__(self) -> None:
        if self.task not in ("items", "kinds"):
            raise ValueError(f"task must be one of items, kinds, got {self.task!r}.")
        for name in ("train_size", "val_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 48 <= self.img_size <= 160:
            raise ValueError(f"img_size must lie in [48, 160], got {self.img_size}.")

    def build(self, seed: int) -> Splits:
        """The two sets; scene i of a set depends on (seed, set, i) alone.

        Raises:
            ValueError: If `items` is a folder without Fashion-MNIST's training files.
        """
        backgrounds = _backgrounds()
        train, val = (
            SceneMaskSet(
                *_load_items(self.items, split),
                backgrounds,
                kinds=self.task == "kinds",
                num_scenes=self.train_size if split == "train" else self.val_size,
                seed=(seed, _SPLITS.index(split)),
                img_size=self.img_size,
            )
            for split in _SPLITS
        )
        names = ("background", *ITEMS) if self.task == "kinds" else ("item",)
        return Splits(train=train, val=val, classes=names, dense=True)


class SceneMaskSet(Dataset[tuple[Image.Image, np.ndarray]]):
    """Composes scene `i` and its mask when it is asked for."""

    def __init__(
        self,
        items: np.ndarray,
        labels: np.ndarray,
        backgrounds: Sequence[np.ndarray],
        *,
        kinds: bool,
        num_scenes: int,
        seed: tuple[int, ...],
        img_size: int,
    ) -> None:
        """Prepare the items; arguments as for `SceneSet`, `kinds`: whether masks tell them."""
        self.items, self.labels, self.backgrounds = items, labels, backgrounds
        self.kinds, self.num_scenes, self.seed, self.img_size = kinds, num_scenes, seed, img_size

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Scene [img_size x img_size RGB] and its mask [img_size, img_size] uint8."""
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        rng = np.random.default_rng((*self.seed, index))
        side = self.img_size
        scene = _background(self.backgrounds, side, rng)
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 4)):
            number = int(rng.integers(len(self.items)))
            size = int(rng.integers(side // 4, side // 2 + 1))
            item = _resized(self.items[[number]], size)[0][:, :: 1 if rng.random() < 0.5 else -1]
            y, x = rng.integers(side - size + 1, size=2)
            _paste(scene, item, y, x, rng)
            inside = _MATTE[item] >= 0.5
            mask[y : y + size, x : x + size][inside] = 1 + self.labels[number] if self.kinds else 1
        return Image.fromarray(_finished(scene)), mask


def _background(photos: Sequence[np.ndarray], side: int, rng: np.random.Generator) -> np.ndarray:
    """A part of a photograph, [3, side, side] float32: numpy is slow over a last axis of three."""
    photo = photos[int(rng.integers(len(photos)))]
    top, left = (rng.integers(n - side + 1) for n in photo.shape[:2])
    photo = photo[top : top + side, left : left + side]
    photo = photo[:, :: 1 if rng.random() < 0.5 else -1]
    scene = np.ascontiguousarray(photo.transpose(2, 0, 1), np.float32)
    scene *= rng.uniform(0.5, 1.0)
    return scene


def _paste(scene: np.ndarray, item: np.ndarray, y: int, x: int, rng: np.random.Generator) -> None:
    """Put an item [size, size] into a scene; a tint keeps items from standing out alike."""
    tint = rng.uniform(0.7, 1.0, 3) * rng.uniform(0.7, 1.0)
    window = scene[:, y : y + item.shape[0], x : x + item.shape[1]]
    window += _MATTE[item] * (_SHADE[item] * tint[:, None, None] - window)


def _finished(scene: np.ndarray) -> np.ndarray:
    """[side, side, 3] uint8."""
    return np.ascontiguousarray(scene.transpose(1, 2, 0).astype(np.uint8))


def _draw_kinds(task: str, rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """Kinds of items in the cells, drawn so that the answers of the task are balanced."""
    num_kinds = len(ITEMS)
    if task == "present":
        return rng.integers(num_kinds, size=num_cells)
    if num_cells == 1:
        return rng.integers(num_kinds, size=1)
    if task == "which":
        kinds = rng.permutation(num_kinds)[: num_cells - 2]
        return rng.permutation(np.concatenate([kinds, kinds[:1].repeat(2)]))
    wanted = SNEAKER if task == "count" else BAG
    others = np.delete(np.arange(num_kinds), wanted)
    kinds = rng.choice(others, num_cells)
    count = rng.integers(len(CLASSES["count"])) if task == "count" else 1
    kinds[rng.permutation(num_cells)[:count]] = wanted
    return kinds


def _target(task: str, kinds: np.ndarray) -> Any:
    if task == "present":
        return torch.from_numpy(np.bincount(kinds, minlength=len(ITEMS)) > 0).float()
    if task == "count":
        return int((kinds == SNEAKER).sum())
    if task == "where":
        return int(np.flatnonzero(kinds == BAG)[0])
    return int(np.bincount(kinds).argmax())


def _resized(items: np.ndarray, side: int) -> np.ndarray:
    tensor = torch.from_numpy(items.copy()).unsqueeze(1).float()
    small = torch.nn.functional.interpolate(tensor, (side, side), mode="bilinear", antialias=True)
    return small.squeeze(1).round().clamp(0, 255).byte().numpy()


@lru_cache(maxsize=2)
def _load_items(items: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    if items == "shipped":
        assets = files("tokendial") / "assets"
        labels = np.array(json.loads((assets / f"items_{split}.json").read_text()))
        with (assets / f"items_{split}.png").open("rb") as file:
            sheet = np.asarray(Image.open(file))
        rows, columns = sheet.shape[0] // 28, sheet.shape[1] // 28
        return sheet.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 28, 28), labels
    part = slice(None, -_HELD_OUT) if split == "train" else slice(-_HELD_OUT, None)
    folder = Path(items)
    images = _read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = _read_idx(folder / "train-labels-idx1-ubyte.gz")
    if images.shape != (len(labels), 28, 28) or set(labels[part].tolist()) != set(range(10)):
        raise ValueError(
            f"data.items: {folder} must hold labelled 28x28 items, all ten kinds both among the "
            f"last {_HELD_OUT:,} and before, got images {images.shape}, labels {labels.shape}."
        )
    return images[part], labels[part]


def _read_idx(path: Path) -> np.ndarray:
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
def _backgrounds() -> tuple[np.ndarray, ...]:
    folder = files("tokendial") / "assets" / "backgrounds"
    photos = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        with entry.open("rb") as file:
            photos.append(np.asarray(Image.open(file).convert("RGB")))
    return tuple(photos)
