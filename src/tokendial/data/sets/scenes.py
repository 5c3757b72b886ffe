"""Crowded scenes composed of real images: nine items on a photograph, no empty cell.

Every token matters in such a scene, so token reduction costs a model accuracy as it does on large
photographs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from tokendial.checks import check_choice
from tokendial.data.sets.scene_items import (
    ITEMS,
    OPACITY,
    crop_background,
    load_backgrounds,
    load_items,
    paste_item,
    resize_items,
    to_pixels,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

ITEM_SIDES = (14, 16, 18)
"""Sides of the items in a scene, in pixels."""
SNEAKER, BAG = ITEMS.index("sneaker"), ITEMS.index("bag")
CLASSES = {
    "present": ITEMS,
    "count": ("0", "1", "2", "3", "4"),
    "where": tuple(f"row {r} column {c}" for r in (1, 2, 3) for c in (1, 2, 3)),
    "which": ITEMS,
}
"""Names of the classes by task."""
_SPLITS = ("train", "val")


@register("data", "scenes")
@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """Generated scenes of nine items on a photograph, with one of four tasks."""

    task: Literal["present", "count", "where", "which"] = "count"
    """Task to learn. present: which kinds of items the scene has (multi-label); count: how many
    sneakers it has, 0 to 4; where: which cell holds the only bag; which: which kind of item occurs
    three times."""
    items: str = "shipped"
    """Source of the items: "shipped" for the 3,000 items that come with Tokendial, or a folder with
    Fashion-MNIST's gzipped IDX files, whose 60,000 training items are used (the last 5,000 for
    validation)."""
    train_size: int = 2000
    """Number of training scenes."""
    val_size: int = 1000
    """Number of validation scenes."""
    img_size: int = 48
    """Side of a scene in pixels, at most 160."""
    cells: int = 3
    """Number of rows and of columns of items: 3, or 1 for a single item (task `which` only)."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, tuple(CLASSES))
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
        """Return the two generated sets; scene i of a set depends on (seed, set, i) only.

        Raises:
            ValueError: If `items` is a folder without Fashion-MNIST's training files.
        """
        backgrounds = load_backgrounds()
        sets = {
            split: SceneSet(
                *load_items(self.items, split),
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
    """Scenes with the target of a task, each composed when it is requested."""

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
        """Resize the items.

        Args:
            items: Items [N, 28, 28] uint8, bright on black.
            labels: Kinds of the items [N], 0 to 9.
            backgrounds: Photographs [H, W, 3] uint8, larger than a scene.
            task: A key of `CLASSES`.
            num_scenes: Number of scenes in the set.
            seed: Seed of the set; together with the index of a scene it seeds that scene.
            img_size: Side of a scene in pixels.
            cells: Number of rows and of columns of items.
        """
        self.item_kinds, self.backgrounds = labels, backgrounds
        self.task, self.num_scenes, self.seed, self.img_size = task, num_scenes, seed, img_size
        self.cells = cells
        self.sprites = [resize_items(items, side) for side in ITEM_SIDES]
        self.by_kind = [np.flatnonzero(labels == kind) for kind in range(len(ITEMS))]

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return scene `index`, an RGB image of side `img_size`, and its target."""
        rng = self._rng(index)
        kinds = _draw_kinds(self.task, rng, self.cells**2)
        return Image.fromarray(self._compose(kinds, rng)), _target(self.task, kinds)

    def layout(self, index: int) -> np.ndarray:
        """Return the kinds of items in the cells of scene `index`, row by row."""
        return _draw_kinds(self.task, self._rng(index), self.cells**2)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        return np.random.default_rng((*self.seed, index))

    def _compose(self, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.img_size
        scene = crop_background(self.backgrounds, side, rng)
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
            paste_item(scene, item, y, x, rng)
        return to_pixels(scene)


@register("data", "scene_masks")
@dataclass(frozen=True, kw_only=True, slots=True)
class SceneMasks:
    """Generated scenes of one to three items on a photograph, with exact masks."""

    task: Literal["items", "kinds"] = "items"
    """Task to learn. items: binary masks of the pixels that belong to an item; kinds: masks of
    classes, 0 for the background and 1 to 10 for the kinds of items."""
    items: str = "shipped"
    """Source of the items: "shipped" for the 3,000 items that come with Tokendial, or a folder with
    Fashion-MNIST's gzipped IDX files, whose 60,000 training items are used (the last 5,000 for
    validation)."""
    train_size: int = 2000
    """Number of training scenes."""
    val_size: int = 500
    """Number of validation scenes."""
    img_size: int = 96
    """Side of a scene in pixels, from 48 to 160."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("items", "kinds"))
        for name in ("train_size", "val_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 48 <= self.img_size <= 160:
            raise ValueError(f"img_size must lie in [48, 160], got {self.img_size}.")

    def build(self, seed: int) -> Splits:
        """Return the two generated sets; scene i of a set depends on (seed, set, i) only.

        Raises:
            ValueError: If `items` is a folder without Fashion-MNIST's training files.
        """
        backgrounds = load_backgrounds()
        train, val = (
            SceneMaskSet(
                *load_items(self.items, split),
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
    """Scenes with their masks, each composed when it is requested."""

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
        """Hold the items; the arguments are those of `SceneSet`.

        With `kinds`, masks hold the kind of each item plus 1, else 1.
        """
        self.items, self.labels, self.backgrounds = items, labels, backgrounds
        self.kinds, self.num_scenes, self.seed, self.img_size = kinds, num_scenes, seed, img_size

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an RGB image of side `img_size` and its mask [img_size, img_size] uint8."""
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        rng = np.random.default_rng((*self.seed, index))
        side = self.img_size
        scene = crop_background(self.backgrounds, side, rng)
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 4)):
            number = int(rng.integers(len(self.items)))
            size = int(rng.integers(side // 4, side // 2 + 1))
            item = resize_items(self.items[[number]], size)[0][
                :, :: 1 if rng.random() < 0.5 else -1
            ]
            y, x = rng.integers(side - size + 1, size=2)
            paste_item(scene, item, y, x, rng)
            inside = OPACITY[item] >= 0.5
            mask[y : y + size, x : x + size][inside] = 1 + self.labels[number] if self.kinds else 1
        return Image.fromarray(to_pixels(scene)), mask


def _draw_kinds(task: str, rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """Draw the kinds of items in the cells so that the targets of the task are balanced."""
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
    """Return the target of a task: float32 [10] of 0 and 1 for "present", else a class index."""
    if task == "present":
        return torch.from_numpy(np.bincount(kinds, minlength=len(ITEMS)) > 0).float()
    if task == "count":
        return int((kinds == SNEAKER).sum())
    if task == "where":
        return int(np.flatnonzero(kinds == BAG)[0])
    return int(np.bincount(kinds).argmax())
