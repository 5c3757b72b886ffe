"""Build Cutouts: pictures with exact masks, composed of photographs that Debian packages hold.

apt-get install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
python tools/build_cutouts.py --out cutouts --sheet

Three tasks, each a folder of its own in ADE20K's layout; docs/cutouts.md describes them. The
pictures are built where they are used and never shipped.
"""

import argparse
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from recolour import recoloured

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import find_images, read_image

T = TypeVar("T")

TASKS = ("saliency", "camouflage", "semantic")
SPLITS = ("training", "validation", "test")
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

STAMPS = Path("/usr/share/tuxpaint/stamps")
_MATE = ("Blinds", "Dune", "FreshFlower", "GreenMeadow", "RainDrops", "Storm", "Wood")
_PLASMA = ("BytheWater", "ColdRipple", "DarkestHour", "FallenLeaf", "Grey", "OneStandsOut", "Path",
           "summer_1am")  # fmt: skip
BACKGROUNDS = (
    *(Path(f"/usr/share/backgrounds/mate/nature/{name}.jpg") for name in _MATE),
    *(Path(f"/usr/share/wallpapers/{name}/contents/images/2560x1600.jpg") for name in _PLASMA),
)
"""Photographs of scenery and textures; hardly anything in them stands out as an object does."""

# Drawings and toys, found by looking at all stamps. Counting colours does not tell them apart: a
# photograph with a palette has 250 colours, a drawing with gradients thousands.
_NOT_PHOTOGRAPHS = (
    "cartoon/*", "*/cartoon/*", "*/flags/*", "*/toys/*", "*_mirror", "clothes/*", "naturalforces/*", "symbols/*",
    "animals/insects/bee", "animals/mammals/echidna", "animals/mammals/hedgehog", "food/pizza",
    "household/arttools/highlighter", "household/dishes/mug", "medical/tooth",
    "people/body_parts/eye", "seasonal/easter/*", "seasonal/hanukkah/*", "seasonal/newyears/*",
    "seasonal/christmas/Santa", "seasonal/christmas/bow", "seasonal/christmas/candy_cane",
    "seasonal/christmas/star", "seasonal/christmas/stocking", "seasonal/christmas/tree",
    "seasonal/halloween/blackcat", "seasonal/halloween/jackolantern_*", "town/roadsigns/arrow",
    "town/roadsigns/crossroads", "town/roadsigns/give_way_sign", "town/roadsigns/hospital",
    "town/roadsigns/roundabout", "town/roadsigns/stop", "town/roadsigns/stoplight_*",
    "town/roadsigns/t-junction", "town/roadsigns/toilets", "town/roadsigns/xing_*",
    "town/roadsigns/yield", "town/monuments/inukshuk-outline", "vehicles/7spoke256",
)  # fmt: skip
_MIN_AREA = 800
"""Solid pixels below which a stamp is too coarse to be enlarged."""
_MIN_FILL = 0.05
"""Least share of its square that a stamp fills; thinner ones have no mask when shrunk."""
_MAX_SOFT = 0.5
"""Largest share of half-transparent pixels; flames and glass have no outline."""

# Share of the picture that one object covers.
_SHARES = {"saliency": (0.02, 0.25), "camouflage": (0.04, 0.2), "semantic": (0.02, 0.12)}
_MAX_SIDE = 0.75
"""Longest side of an object in sides of the picture: turned by 20 degrees it still fits."""
_MAX_TURN = 20.0
_TRIED_PLACES = 8
STRENGTH = 0.9
"""How far camouflage moves an object's colours, from 0 (not at all) to 1 (all the way)."""
_SHEET_ITEMS, _SHEET_CELL, _SHEET_COLUMNS = 24, 192, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutout:
    """One photographed object."""

    label: int
    """1 to 10, a position in `CATEGORIES`; 0 for objects of no category."""
    digest: str
    """SHA-256 of its file."""
    area: float
    """Pixels whose alpha is at least a half."""
    picture: Image.Image
    """RGBA, cropped to what is visible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """One photograph."""

    digest: str
    """SHA-256 of its file."""
    picture: Image.Image
    """RGB."""


def load_cutouts(folder: Path, size: int) -> list[Cutout]:
    """The photographed objects of a folder of stamps, each once, ordered by digest.

    Args:
        folder: Folder of PNG files with alpha, in folders by category.
        size: Side of the pictures to build in pixels; larger cut-outs are shrunk to it.

    Raises:
        ValueError: If there is no PNG file below `folder`, or one cannot be read.
    """
    files = sorted(folder.rglob("*.png"))
    if not files:
        raise ValueError(
            f"--stamps: {folder} holds no PNG files; install the Debian package "
            f"tuxpaint-stamps-default, or name the folder of its stamps."
        )
    found: dict[str, Cutout] = {}
    for path in files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if any(fnmatch(name, pattern) for pattern in _NOT_PHOTOGRAPHS):
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        try:
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"--stamps: {path} cannot be decoded ({error}).") from None
        if digest not in found and _has_outline(np.asarray(picture.getchannel("A"))):
            found[digest] = _cutout(picture, digest, label_of(name), size)
    return sorted(found.values(), key=lambda cutout: cutout.digest)


def _has_outline(alpha: np.ndarray) -> bool:
    rows, columns = np.nonzero(alpha >= 128)
    if len(rows) < _MIN_AREA:
        return False
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    visible = alpha > 25
    soft = (visible & (alpha < 230)).sum() / visible.sum()
    return bool(len(rows) / side**2 >= _MIN_FILL and soft <= _MAX_SOFT)


def _cutout(picture: Image.Image, digest: str, label: int, size: int) -> Cutout:
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    area = float((np.asarray(picture.getchannel("A")) >= 128).sum())
    return Cutout(label=label, digest=digest, area=area, picture=picture)


def label_of(name: str) -> int:
    """Label of a stamp by its path below the folder of stamps; 0 if it is in no category."""
    for label, folders in enumerate(CATEGORIES.values(), start=1):
        if any(name.startswith(f"{folder}/") for folder in folders):
            return label
    return 0


def load_backgrounds(paths: Sequence[Path], size: int) -> list[Background]:
    """Photographs among `paths` (files, and folders that are searched), ordered by digest.

    Args:
        paths: Files and folders.
        size: Side of the pictures to build in pixels. Photographs are shrunk to three times
            that on their short side, so that crops show a third of it at least.

    Raises:
        ValueError: If a path is missing, holds no image, or an image cannot be read.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise ValueError(
            f"--backgrounds: {missing[0]} is missing; install the Debian packages "
            f"mate-backgrounds and plasma-workspace-wallpapers, or name photographs of your own."
        )
    found: dict[str, Background] = {}
    for path in find_images(paths):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        picture = read_image(path)
        factor = min(1.0, 3 * size / min(picture.size))
        width, height = (max(1, round(side * factor)) for side in picture.size)
        shrunk = picture.resize((width, height), Image.Resampling.LANCZOS)
        found.setdefault(digest, Background(digest=digest, picture=shrunk))
    return sorted(found.values(), key=lambda background: background.digest)


def shares(items: Sequence[T], what: str) -> dict[str, list[T]]:
    """Deal items to the splits: a fifth each to validation and test, the rest to training.

    The order decides, so what is ordered by digest is dealt alike whatever the seed or the task.

    Raises:
        ValueError: If there are fewer than three items; `what` names them.
    """
    if len(items) < len(SPLITS):
        raise ValueError(f"{what}: one for each split is needed, 3 at least, got {len(items)}.")
    held = max(1, len(items) // 5)
    return {
        "training": list(items[2 * held :]),
        "validation": list(items[:held]),
        "test": list(items[held : 2 * held]),
    }


def deal_cutouts(cutouts: Sequence[Cutout]) -> dict[str, list[Cutout]]:
    """Deal cut-outs to the splits, category by category.

    Raises:
        ValueError: If a category has fewer than three; there may be none of no category.
    """
    dealt: dict[str, list[Cutout]] = {split: [] for split in SPLITS}
    for label, name in enumerate(("other", *CATEGORIES)):
        members = [cutout for cutout in cutouts if cutout.label == label]
        if label == 0 and not members:
            continue
        for split, part in shares(members, f"--stamps, objects of {name}").items():
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
    scene = _ground(rng, backgrounds, size)
    annotation = np.zeros((size, size), np.uint8)
    if task == "camouflage":
        _, sprite = _sprite(task, rng, cutouts, size)
        grey = np.asarray(scene.convert("L"), np.float32)
        # On an even ground nothing hides, so the most textured of some places is taken.
        top, left = max(_places(rng, sprite, size), key=lambda at: grey[_window(at, sprite)].std())
        ground = np.asarray(scene)[_window((top, left), sprite)]
        _put(scene, annotation, recoloured(sprite, ground, STRENGTH), (top, left), 255)
        return scene, annotation
    low, high = (1, 3) if task == "saliency" else (3, 6)
    for _ in range(int(rng.integers(low, high + 1))):
        label, sprite = _sprite(task, rng, cutouts, size)
        taken = annotation > 0
        place = min(_places(rng, sprite, size), key=lambda at: taken[_window(at, sprite)].sum())
        _put(scene, annotation, sprite, place, 255 if task == "saliency" else label)
    return scene, annotation


def _ground(rng: np.random.Generator, backgrounds: Sequence[Background], size: int) -> Image.Image:
    picture = backgrounds[int(rng.integers(len(backgrounds)))].picture
    short = min(picture.size)
    side = int(rng.integers(min(size, short), short + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return _mirrored(crop, rng)


def _sprite(
    task: str, rng: np.random.Generator, cutouts: Sequence[Cutout], size: int
) -> tuple[int, Image.Image]:
    if task == "semantic":
        label = 1 + int(rng.integers(len(CATEGORIES)))
        cutouts = [cutout for cutout in cutouts if cutout.label == label]
    low, high = _SHARES[task]
    while True:
        cutout = cutouts[int(rng.integers(len(cutouts)))]
        share = math.exp(rng.uniform(math.log(low), math.log(high)))
        factor = size * math.sqrt(share / cutout.area)
        factor = min(factor, _MAX_SIDE * size / max(cutout.picture.size))
        width, height = (max(1, round(side * factor)) for side in cutout.picture.size)
        sprite = _mirrored(cutout.picture, rng).resize((width, height), Image.Resampling.BICUBIC)
        angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
        sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        # In a picture of 32 pixels the thinnest objects are nowhere half opaque.
        if np.asarray(sprite.getchannel("A")).max() >= 128:
            return cutout.label, sprite.crop(sprite.getchannel("A").getbbox())


def _mirrored(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return picture.transpose(flip) if rng.random() < 0.5 else picture


def _places(rng: np.random.Generator, sprite: Image.Image, size: int) -> list[tuple[int, int]]:
    """Rows and columns for the sprite's corner, all of it inside the picture."""
    free = (size - sprite.height + 1, size - sprite.width + 1)
    places = rng.integers(free, size=(_TRIED_PLACES, 2))
    return [(int(top), int(left)) for top, left in places]


def _window(at: tuple[int, int], sprite: Image.Image) -> tuple[slice, slice]:
    top, left = at
    return slice(top, top + sprite.height), slice(left, left + sprite.width)


def _put(
    scene: Image.Image, annotation: np.ndarray, sprite: Image.Image, at: tuple[int, int], label: int
) -> None:
    alpha = sprite.getchannel("A")
    scene.paste(sprite.convert("RGB"), (at[1], at[0]), mask=alpha)
    annotation[_window(at, sprite)][np.asarray(alpha) >= 128] = label


def item_rng(seed: int, task: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of item `index` of a split; nothing else decides how it looks."""
    return np.random.default_rng((seed, TASKS.index(task), SPLITS.index(split), index))


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
    for split in SPLITS:
        for index in range(_SHEET_ITEMS // len(SPLITS)):
            image_path, annotation_path = item_paths(root, split, index)
            if image_path.exists():
                labels = np.asarray(Image.open(annotation_path))
                yield read_image(image_path), Image.fromarray(palette[labels])


def _at_least(low: int, high: float = math.inf) -> Callable[[str], int]:
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
    add("--size", type=_at_least(32, 1024), default=256, help="side in pixels, 32 to 1024")
    add("--train", type=_at_least(0), default=2000, help="pictures for training")
    add("--val", type=_at_least(0), default=400, help="pictures for validation")
    add("--test", type=_at_least(0), default=400, help="pictures for testing")
    add("--seed", type=_at_least(0), default=0)
    add("--stamps", type=Path, default=STAMPS, help="folder of tuxpaint-stamps-default")
    add("--backgrounds", type=Path, nargs="+", default=BACKGROUNDS, help="photographs or folders")
    add("--sheet", action="store_true", help="write a contact sheet, sheet.png, for each task")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    size, seed = options.size, options.seed
    try:
        cutouts = deal_cutouts(load_cutouts(options.stamps, size))
        photographs = load_backgrounds(options.backgrounds, size)
        backgrounds = shares(photographs, "--backgrounds, photographs")
        for label, name in enumerate(("other", *CATEGORIES)):
            counts = [sum(item.label == label for item in cutouts[split]) for split in SPLITS]
            print(f"{name}: {counts[0]} + {counts[1]} + {counts[2]} objects")
        for task in options.task:
            root = options.out / task
            wanted = dict(zip(SPLITS, (options.train, options.val, options.test), strict=True))
            num_built = build(root, task, cutouts, backgrounds, size=size, counts=wanted, seed=seed)
            print(f"{root}: {num_built} built, {sum(wanted.values()) - num_built} there already")
            if options.sheet:
                print(write_sheet(root))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
