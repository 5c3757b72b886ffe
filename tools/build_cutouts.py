"""Build Cutouts: pictures with exact masks, composed of photographs that Debian packages hold.

apt-get install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
python tools/build_cutouts.py --out cutouts --sheet

Three tasks, each a folder of its own in ADE20K's layout; docs/cutouts.md describes them. The
pictures are built where they are used and never shipped.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from recolour import recoloured

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import read_image
from tokendial.data.readers.stamps import (
    BACKGROUNDS,
    PARTS,
    STAMPS,
    Background,
    Cutout,
    deal,
    load_backgrounds,
    load_cutouts,
)
from tokendial.data.sets.stamp_scenes import (
    crop_photograph,
    freest_place,
    paste_sprite,
    random_places,
    random_sprite,
    window,
)

TASKS = ("saliency", "camouflage", "semantic")
CATEGORIES = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "fish or shellfish": ("animals/fish", "animals/shellfish"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "household item": ("household",),
    "musical instrument": ("hobbies/music",),
    "planet or moon": ("space/planets", "space/moon"),
    "vehicle": ("vehicles", "military/vehicles"),
}
"""Folders of stamps by category; the first category has label 1. Other stamps have label 0."""

# Share of the picture that one object covers.
_SHARES = {"saliency": (0.02, 0.25), "camouflage": (0.04, 0.2), "semantic": (0.02, 0.12)}
STRENGTH = 0.9
"""How far camouflage moves an object's colours, from 0 (not at all) to 1 (all the way)."""
_SHEET_ITEMS, _SHEET_CELL, _SHEET_COLUMNS = 24, 192, 8


@cache
def label_of(name: str) -> int:
    """Label of a stamp by its path below the folder of stamps; 0 if it is in no category."""
    for label, folders in enumerate(CATEGORIES.values(), start=1):
        if any(name.startswith(f"{folder}/") for folder in folders):
            return label
    return 0


def deal_cutouts(cutouts: Sequence[Cutout]) -> dict[str, list[Cutout]]:
    """Deal cut-outs to the splits, category by category.

    Raises:
        ValueError: If a category has fewer than three; there may be none of no category.
    """
    dealt: dict[str, list[Cutout]] = {split: [] for split in PARTS}
    for label, name in enumerate(("other", *CATEGORIES)):
        members = [cutout for cutout in cutouts if label_of(cutout.name) == label]
        if label == 0 and not members:
            continue
        for split, part in deal(members, f"--stamps, objects of {name}").items():
            dealt[split] += part
    return dealt


def compose(
    task: str,
    rng: np.random.Generator,
    cutouts: Sequence[Cutout],
    backgrounds: Sequence[Background],
    size: int,
) -> tuple[Image.Image, np.ndarray]:
    """One picture and its annotation.

    Args:
        task: One of `TASKS`.
        rng: Decides everything.
        cutouts: Objects to draw from.
        backgrounds: Photographs to draw from.
        size: Side of the picture in pixels.

    Returns:
        The RGB picture, and its annotation [size, size] uint8: 255 (object) and 0 for saliency
        and camouflage; for semantic the label of the category, 0 where there is no object.
    """
    scene = crop_photograph(backgrounds, size, rng)
    annotation = np.zeros((size, size), np.uint8)
    if task == "camouflage":
        _, sprite = random_sprite(cutouts, size, _SHARES[task], rng)
        grey = np.asarray(scene.convert("L"), np.float32)
        # On an even ground nothing hides, so the most textured of some places is taken.
        places = random_places(sprite, size, rng)
        place = max(places, key=lambda at: grey[window(at, sprite)].std())
        ground = np.asarray(scene)[window(place, sprite)]
        paste_sprite(scene, annotation, recoloured(sprite, ground, STRENGTH), place, 255)
        return scene, annotation
    low, high = (1, 3) if task == "saliency" else (3, 6)
    for _ in range(int(rng.integers(low, high + 1))):
        drawn = cutouts
        if task == "semantic":
            wanted = 1 + int(rng.integers(len(CATEGORIES)))
            drawn = [cutout for cutout in cutouts if label_of(cutout.name) == wanted]
        cutout, sprite = random_sprite(drawn, size, _SHARES[task], rng)
        place = freest_place(sprite, annotation, rng)
        label = 255 if task == "saliency" else label_of(cutout.name)
        paste_sprite(scene, annotation, sprite, place, label)
    return scene, annotation


def item_rng(seed: int, task: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of item `index` of a split; nothing else decides how it looks."""
    return np.random.default_rng((seed, TASKS.index(task), PARTS.index(split), index))


def item_paths(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """Where the picture and the annotation of an item are kept."""
    stem = f"{split}_{index:06d}"
    return root / "images" / split / f"{stem}.jpg", root / "annotations" / split / f"{stem}.png"


def claim(root: Path, settings: dict[str, Any]) -> None:
    """Note the settings in a task's folder.

    Raises:
        ValueError: If the folder was built with other settings.
    """
    path = root / "settings.json"
    if path.exists():
        noted = json.loads(path.read_text())
        for name, value in settings.items():
            if noted.get(name) != value:
                raise ValueError(
                    f"{path}: {name} is {noted.get(name)!r} there, got {value!r}; "
                    f"a folder holds one setting, choose another --out."
                )
        return
    root.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def build(
    root: Path,
    task: str,
    cutouts: dict[str, list[Cutout]],
    backgrounds: dict[str, list[Background]],
    *,
    size: int,
    counts: dict[str, int],
    seed: int,
) -> int:
    """Build one task's folder and return how many items were built; those there are skipped.

    Args:
        root: The task's folder.
        task: One of `TASKS`.
        cutouts: Objects by split.
        backgrounds: Photographs by split.
        size: Side of the pictures in pixels.
        counts: Items by split.
        seed: Seed of all items.

    Raises:
        ValueError: If the folder was built with other settings.
    """
    digests = sorted(
        item.digest for parts in (cutouts, backgrounds) for part in parts.values() for item in part
    )
    sources = hashlib.sha256("".join(digests).encode()).hexdigest()
    claim(root, {"task": task, "size": size, "seed": seed, **counts, "sources": sources})
    if task == "semantic":
        names = {str(label): name for label, name in enumerate(("background", *CATEGORIES))}
        with atomic_write(root / "classes.json") as temporary:
            temporary.write_text(json.dumps(names, indent=2) + "\n")
    num_built = 0
    for split, count in counts.items():
        for path in item_paths(root, split, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image_path, annotation_path = item_paths(root, split, index)
            if image_path.exists() and annotation_path.exists():
                continue
            rng = item_rng(seed, task, split, index)
            image, annotation = compose(task, rng, cutouts[split], backgrounds[split], size)
            with atomic_write(image_path) as temporary:
                image.save(temporary, format="JPEG", quality=95, subsampling=0)
            with atomic_write(annotation_path) as temporary:
                Image.fromarray(annotation).save(temporary, format="PNG")
            num_built += 1
    return num_built


def write_sheet(root: Path) -> Path:
    """Write the first items of a task's folder, pictures above annotations, to its sheet.png.

    Raises:
        ValueError: If the folder holds no items.
    """
    pairs = list(_first_items(root))
    if not pairs:
        raise ValueError(f"--sheet: {root} holds no items; ask for at least one.")
    rows = math.ceil(len(pairs) / _SHEET_COLUMNS)
    cell = _SHEET_CELL
    sheet = Image.new("RGB", (_SHEET_COLUMNS * cell, 2 * rows * cell))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, _SHEET_COLUMNS)
        for below, picture in enumerate(pair):
            shown = picture.resize((cell, cell), Image.Resampling.NEAREST if below else None)
            sheet.paste(shown, (column * cell, (2 * row + below) * cell))
    path = root / "sheet.png"
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _first_items(root: Path) -> Iterator[tuple[Image.Image, Image.Image]]:
    # Hues for labels; 255, the object of the binary tasks, is white.
    hues = Image.new("HSV", (256, 1))
    step = 256 // (len(CATEGORIES) + 1)
    hues.putdata([(label * step % 256, 255, 255 if label else 0) for label in range(256)])
    palette = np.asarray(hues.convert("RGB"))[0].copy()
    palette[255] = 255
    for split in PARTS:
        for index in range(_SHEET_ITEMS // len(PARTS)):
            image_path, annotation_path = item_paths(root, split, index)
            if image_path.exists():
                labels = np.asarray(Image.open(annotation_path))
                yield read_image(image_path), Image.fromarray(palette[labels])


def at_least(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Function that reads an option as a whole number of at least `low` and at most `high`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {value}.")
        return value

    return whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build pictures with exact masks.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder for each task is made here")
    add("--task", nargs="+", choices=TASKS, default=TASKS, help="default: all three")
    add("--size", type=at_least(32, 1024), default=256, help="side in pixels, 32 to 1024")
    add("--train", type=at_least(0), default=2000, help="pictures for training")
    add("--val", type=at_least(0), default=400, help="pictures for validation")
    add("--test", type=at_least(0), default=400, help="pictures for testing")
    add("--seed", type=at_least(0), default=0)
    add("--stamps", type=Path, default=STAMPS, help="folder of tuxpaint-stamps-default")
    add("--backgrounds", type=Path, nargs="+", default=BACKGROUNDS, help="photographs or folders")
    add("--sheet", action="store_true", help="write a contact sheet, sheet.png, for each task")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    size, seed = options.size, options.seed
    try:
        cutouts = deal_cutouts(load_cutouts(options.stamps, size, setting="--stamps"))
        photographs = load_backgrounds(options.backgrounds, size, setting="--backgrounds")
        backgrounds = deal(photographs, "--backgrounds, photographs")
        for label, name in enumerate(("other", *CATEGORIES)):
            counts = [
                sum(label_of(item.name) == label for item in cutouts[split]) for split in PARTS
            ]
            print(f"{name}: {counts[0]} + {counts[1]} + {counts[2]} objects")
        for task in options.task:
            root = options.out / task
            wanted = dict(zip(PARTS, (options.train, options.val, options.test), strict=True))
            num_built = build(root, task, cutouts, backgrounds, size=size, counts=wanted, seed=seed)
            print(f"{root}: {num_built} built, {sum(wanted.values()) - num_built} there already")
            if options.sheet:
                print(write_sheet(root))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
