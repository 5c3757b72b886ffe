"""Build real pictures without labels, to train a compensator on.

apt-get install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
python tools/build_real_pictures.py --out real_pictures --number 6000 --size 224 \
    --folder SITE_PACKAGES/skimage/data SITE_PACKAGES/sklearn/datasets/images --elpv elpv_dataset

A folder for each kind: stamps (objects on photographs), wallpapers (crops), photographs (crops of
the pictures in --folder) and cells (solar cells, with --elpv). Objects, photographs and cells of
the test and validation parts of the data sets `stamps` and `elpv` (split_seed 0) are left out, so
that a compensator never sees what it is tested on. The pictures are built where they are used and
never shipped.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from build_cutouts import at_least, claim
from PIL import Image, ImageOps

from tokendial.atomic import atomic_write
from tokendial.data import ELPV, Stamps, read_image
from tokendial.data.readers.images import list_images
from tokendial.data.readers.stamps import STAMPS, Background, load_backgrounds
from tokendial.data.sets.stamp_scenes import crop_photograph
from tokendial.data.sets.stamps import StampCategorySet, StampPictures

_MATE = ("Aqua", "Garden", "LadyBird", "TwoWings", "YellowFlower")
_PLASMA = ("ColorfulCups", "EveningGlow", "Kite")
WALLPAPERS = (
    *(Path(f"/usr/share/backgrounds/mate/nature/{name}.jpg") for name in _MATE),
    *(Path(f"/usr/share/wallpapers/{name}/contents/images/2560x1600.jpg") for name in _PLASMA),
)
"""Photographs with objects of their own, which are no backgrounds for stamps."""
KINDS = {"stamps": 4, "wallpapers": 2, "photographs": 2, "cells": 2}
"""Kinds of pictures, and how many of each are built for one another."""
# Files of scikit-image's folder that are no photographs.
_NOT_PHOTOGRAPHS = (
    "chessboard_*", "color.png", "horse.png", "logo.png", "multipage*", "no_time_for_that*",
    "page.png", "phantom.png", "tests/*", "text.png",
)  # fmt: skip
_CLUTTER = 3
"""Further objects in every other picture of stamps."""

Compose = Callable[[np.random.Generator, int], Image.Image]
"""Function that makes a picture of its random numbers and its number."""


def photographs_of(paths: Sequence[Path]) -> list[Path]:
    """Photographs among files, and in folders that are searched, without known drawings and text.

    Raises:
        ValueError: If a path is missing.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file.relative_to(path).as_posix() for file in list_images(path)]
            found += [
                path / name
                for name in inside
                if not any(fnmatch(name, pattern) for pattern in _NOT_PHOTOGRAPHS)
            ]
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"--folder: no such file or folder: {path}.")
    return found


def training_cells(folder: Path, *, check: bool = True) -> list[Path]:
    """Solar cells that are not in the test set of the data set `elpv`.

    Args:
        folder: Folder of the package elpv-dataset.
        check: Whether the list must be the published one.

    Raises:
        ValueError: If it is not, or an image is missing.
    """
    train = ELPV(root=str(folder), check=check).build(seed=0).train
    return sorted(path for path, _ in train.files)


def count_by_kind(number: int, kinds: Sequence[str]) -> dict[str, int]:
    """Number of pictures of each kind; what does not divide evenly goes to the first."""
    total = sum(KINDS[kind] for kind in kinds)
    counts = {kind: number * KINDS[kind] // total for kind in kinds}
    counts[kinds[0]] += number - sum(counts.values())
    return counts


def whole_cells(files: Sequence[Path], size: int, seed: int) -> Compose:
    """Function that makes whole cells, mirrored at random, in an order that the seed draws."""
    order = np.random.default_rng(seed).permutation(len(files))

    def compose(rng: np.random.Generator, index: int) -> Image.Image:
        picture = read_image(files[order[index % len(files)]])
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return ImageOps.flip(picture) if rng.random() < 0.5 else picture

    return compose


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What pictures of one kind are made of."""

    compose: Compose
    """Function that makes a picture."""
    digests: list[str]
    """SHA-256 of each file that is used."""


def sources_of(options: argparse.Namespace) -> dict[str, Source]:
    """The source of each kind that the command line asks for.

    Raises:
        ValueError: If a package, a file or a folder is missing, or holds too little.
    """
    size, seed = options.size, options.seed
    stamps = Stamps(
        img_size=size,
        train_size=options.number,
        stamps=str(options.stamps),
        backgrounds=options.backgrounds and [str(path) for path in options.backgrounds],
    )
    plain, cluttered = (
        stamp_pictures(replace(stamps, clutter=clutter), seed) for clutter in (0, _CLUTTER)
    )
    part = cluttered.part
    objects = [cutout for of_class in (*part.by_class, part.others) for cutout in of_class]
    wallpapers = load_backgrounds(options.wallpapers, size, setting="--wallpapers")
    found = {
        "stamps": Source(
            compose=lambda rng, index: (plain, cluttered)[index % 2].compose(index)[0],
            digests=[item.digest for item in (*objects, *part.backgrounds)],
        ),
        "wallpapers": crops_source([*part.backgrounds, *wallpapers], size),
    }
    if options.folder:
        photographs = load_backgrounds(photographs_of(options.folder), size, setting="--folder")
        found["photographs"] = crops_source(photographs, size)
    if options.elpv:
        files = training_cells(options.elpv)
        found["cells"] = Source(
            compose=whole_cells(files, size, seed),
            digests=[hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        )
    return found


def stamp_pictures(stamps: Stamps, seed: int) -> StampPictures:
    """Pictures of the training part."""
    train = stamps.build(seed).train
    assert isinstance(train, StampCategorySet)
    return train.pictures


def crops_source(backgrounds: Sequence[Background], size: int) -> Source:
    """Random crops of photographs."""
    return Source(
        compose=lambda rng, index: crop_photograph(backgrounds, size, rng),
        digests=[background.digest for background in backgrounds],
    )


def build(root: Path, sources: dict[str, Source], *, number: int, size: int, seed: int) -> int:
    """Build the pictures of all kinds and return how many were built; those there are skipped.

    Picture i of a kind depends on (seed, kind, i) and the sources only.

    Args:
        root: Folder in which a folder for each kind is made.
        sources: Source of each kind.
        number: Number of pictures of all kinds together.
        size: Side of the pictures in pixels.
        seed: Seed of all pictures.

    Raises:
        ValueError: If the folder was built with other settings.
    """
    digests = sorted(digest for source in sources.values() for digest in source.digests)
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    counts = count_by_kind(number, list(sources))
    claim(root, {"size": size, "seed": seed, **counts, "sources": digest})
    num_built = 0
    for kind, source in sources.items():
        (root / kind).mkdir(exist_ok=True)
        for index in range(counts[kind]):
            path = root / kind / f"{kind}_{index:06d}.jpg"
            if path.exists():
                continue
            rng = np.random.default_rng((seed, list(KINDS).index(kind), index))
            picture = source.compose(rng, index)
            with atomic_write(path) as temporary:
                picture.save(temporary, format="JPEG", quality=95, subsampling=0)
            num_built += 1
    return num_built


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(description="Build real pictures without labels.")
    add = built.add_argument
    add("--out", type=Path, required=True, help="a folder for each kind of picture is made here")
    add("--number", type=at_least(1), default=6000, help="pictures in all")
    add("--size", type=at_least(32, 1024), default=224, help="side in pixels, 32 to 1024")
    add("--seed", type=at_least(0), default=0)
    add("--stamps", type=Path, default=STAMPS, help="folder of tuxpaint-stamps-default")
    add("--backgrounds", type=Path, nargs="+", help="photographs or folders, for the stamps")
    add("--wallpapers", type=Path, nargs="+", default=WALLPAPERS, help="photographs or folders")
    add("--folder", type=Path, nargs="+", help="further photographs, or folders of them")
    add("--elpv", type=Path, help="folder of the package elpv-dataset, for solar cells")
    return built


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(arguments)
    try:
        sources = sources_of(options)
        num_built = build(
            options.out, sources, number=options.number, size=options.size, seed=options.seed
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for kind, count in count_by_kind(options.number, list(sources)).items():
        print(f"{options.out / kind}: {count} pictures of {len(sources[kind].digests)} files")
    print(f"{options.out}: {num_built} built, {options.number - num_built} there already")


if __name__ == "__main__":
    main()
