"""Photographed objects with outlines, and photographs to place them on, from Debian packages.

tuxpaint-stamps-default holds PNG files with alpha in folders by category: photographs and drawings.
mate-backgrounds and plasma-workspace-wallpapers hold the photographs of the background.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image

from tokendial.data.readers.images import find_images, read_image

T = TypeVar("T")

PARTS = ("training", "validation", "test")
"""Parts that objects and photographs are dealt to."""
STAMPS = Path("/usr/share/tuxpaint/stamps")
"""Folder in which Debian installs the stamps."""
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
    "cartoon/*", "*/cartoon/*", "*/flags/*", "*/toys/*", "*_mirror", "clothes/*",
    "naturalforces/*", "symbols/*", "animals/insects/bee", "animals/mammals/echidna",
    "animals/mammals/hedgehog", "food/pizza", "household/arttools/highlighter",
    "household/dishes/mug", "medical/tooth", "people/body_parts/eye", "seasonal/easter/*",
    "seasonal/hanukkah/*", "seasonal/newyears/*", "seasonal/christmas/Santa",
    "seasonal/christmas/bow", "seasonal/christmas/candy_cane", "seasonal/christmas/star",
    "seasonal/christmas/stocking", "seasonal/christmas/tree", "seasonal/halloween/blackcat",
    "seasonal/halloween/jackolantern_*", "town/roadsigns/arrow", "town/roadsigns/crossroads",
    "town/roadsigns/give_way_sign", "town/roadsigns/hospital", "town/roadsigns/roundabout",
    "town/roadsigns/stop", "town/roadsigns/stoplight_*", "town/roadsigns/t-junction",
    "town/roadsigns/toilets", "town/roadsigns/xing_*", "town/roadsigns/yield",
    "town/monuments/inukshuk-outline", "vehicles/7spoke256",
)  # fmt: skip
_MIN_AREA = 800
"""Solid pixels below which a stamp is too coarse to be enlarged."""
_MIN_FILL = 0.05
"""Least share of its square that a stamp fills; thinner ones have no mask when shrunk."""
_MAX_SOFT = 0.5
"""Largest share of half-transparent pixels; flames and glass have no outline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutout:
    """One photographed object."""

    name: str
    """Path of its file below the folder of stamps, without the ending: animals/birds/owl."""
    digest: str
    """SHA-256 of its file."""
    area: float
    """Number of pixels whose alpha is at least a half."""
    picture: Image.Image
    """RGBA image, cropped to what is visible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """One photograph."""

    digest: str
    """SHA-256 of its file."""
    picture: Image.Image
    """RGB image."""


def load_cutouts(folder: Path, size: int, *, setting: str) -> list[Cutout]:
    """Return the photographed objects of a folder of stamps, each once, ordered by digest.

    Drawings, copies, and stamps without a solid outline are left out.

    Args:
        folder: Folder of PNG files with alpha, in folders by category.
        size: Side of the pictures to compose in pixels; larger objects are shrunk to it.
        setting: Name of the setting that names the folder, for messages.

    Raises:
        ValueError: If there is no PNG file below `folder`, or one cannot be read.
    """
    files = sorted(folder.rglob("*.png"))
    if not files:
        raise ValueError(
            f"{setting}: {folder} holds no PNG files; install the Debian package "
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
            raise ValueError(f"{setting}: {path} cannot be decoded ({error}).") from None
        if digest not in found and has_outline(np.asarray(picture.getchannel("A"))):
            found[digest] = _cutout(name, digest, picture, size)
    return sorted(found.values(), key=lambda cutout: cutout.digest)


def has_outline(alpha: np.ndarray) -> bool:
    """Return whether a stamp is a solid object that is large enough to have an exact mask.

    Args:
        alpha: Alpha channel [H, W] uint8.
    """
    rows, columns = np.nonzero(alpha >= 128)
    if len(rows) < _MIN_AREA:
        return False
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    visible = alpha > 25
    soft = (visible & (alpha < 230)).sum() / visible.sum()
    return bool(len(rows) / side**2 >= _MIN_FILL and soft <= _MAX_SOFT)


def _cutout(name: str, digest: str, picture: Image.Image, size: int) -> Cutout:
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    area = float((np.asarray(picture.getchannel("A")) >= 128).sum())
    return Cutout(name=name, digest=digest, area=area, picture=picture)


def load_backgrounds(paths: Sequence[Path], size: int, *, setting: str) -> list[Background]:
    """Return the photographs in `paths`, ordered by digest.

    Args:
        paths: Image files, and folders that are searched for them.
        size: Side of the pictures to compose in pixels. Photographs are shrunk to three times that
            on their short side, so that crops show a third of it at least.
        setting: Name of the setting that names the paths, for messages.

    Raises:
        ValueError: If a path is missing, holds no image, or an image cannot be read.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise ValueError(
            f"{setting}: {missing[0]} is missing; install the Debian packages "
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


def classes_by_folder(names: Iterable[str], at_least: int) -> dict[str, str]:
    """Return the class of each object by its name: the nearest folder that holds enough objects.

    The deepest folders come first. The objects of a folder that has too few of them count as
    objects of its parent. Objects for which no folder has enough get no class.

    Args:
        names: Names of objects: paths without ending.
        at_least: Least number of objects of a class.

    Example:
        >>> classes_by_folder(["pets/cats/a", "pets/cats/b", "pets/c", "pets/dogs/d", "e"], 2)
        {'pets/cats/a': 'pets/cats', 'pets/cats/b': 'pets/cats', 'pets/c': 'pets', \
'pets/dogs/d': 'pets'}
    """
    waiting: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for name in names:
        waiting[PurePosixPath(name).parent].append(name)
    classes: dict[str, str] = {}
    top = PurePosixPath()
    while folders := waiting.keys() - {top}:
        folder = max(folders, key=lambda path: (len(path.parts), path))
        members = waiting.pop(folder)
        if len(members) >= at_least:
            classes |= dict.fromkeys(members, folder.as_posix())
        else:
            waiting[folder.parent] += members
    return classes


def deal(
    items: Sequence[T], what: str, *, val_every: int = 5, test_every: int = 5
) -> dict[str, list[T]]:
    """Deal items to the parts: at least one each to validation and test, the rest to training.

    The order decides: equal lists are dealt alike.

    Args:
        items: Items to deal.
        what: Setting and kind of the items, for messages.
        val_every: Of how many items one goes to validation.
        test_every: Of how many items one goes to test.

    Raises:
        ValueError: If there are fewer than three items.
    """
    if len(items) < len(PARTS):
        raise ValueError(f"{what}: one for each split is needed, 3 at least, got {len(items)}.")
    num_val = max(1, len(items) // val_every)
    num_held = num_val + max(1, len(items) // test_every)
    return {
        "training": list(items[num_held:]),
        "validation": list(items[:num_val]),
        "test": list(items[num_val:num_held]),
    }
