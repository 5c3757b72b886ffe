"""How pictures are composed of photographed objects and photographs: crop, turn, place, paste."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tokendial.data.readers.stamps import Background, Cutout

_MAX_SIDE = 0.75
"""Longest side of an object in sides of the picture: turned by 20 degrees it still fits."""
_MAX_TURN = 20.0
_TRIED_PLACES = 8


def crop_photograph(
    backgrounds: Sequence[Background], size: int, rng: np.random.Generator
) -> Image.Image:
    """Return a random square of a random photograph, as an image of side `size`."""
    picture = backgrounds[int(rng.integers(len(backgrounds)))].picture
    short = min(picture.size)
    side = int(rng.integers(min(size, short), short + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return _mirrored(crop, rng)


def random_sprite(
    cutouts: Sequence[Cutout],
    size: int,
    share: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Cutout, Image.Image]:
    """Return a random object, and its image (RGBA) mirrored, resized and turned at random.

    Args:
        cutouts: Objects to draw from.
        size: Side of the picture in pixels.
        share: Least and largest share of the picture that an object covers. Long objects stay
            smaller, so that they fit.
        rng: Decides everything.
    """
    low, high = share
    while True:
        cutout = cutouts[int(rng.integers(len(cutouts)))]
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        factor = size * math.sqrt(drawn / cutout.area)
        factor = min(factor, _MAX_SIDE * size / max(cutout.picture.size))
        width, height = (max(1, round(side * factor)) for side in cutout.picture.size)
        sprite = _mirrored(cutout.picture, rng).resize((width, height), Image.Resampling.BICUBIC)
        angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
        sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        # In a picture of 32 pixels the thinnest objects are nowhere half opaque.
        if np.asarray(sprite.getchannel("A")).max() >= 128:
            return cutout, sprite.crop(sprite.getchannel("A").getbbox())


def _mirrored(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return picture.transpose(flip) if rng.random() < 0.5 else picture


def random_places(
    sprite: Image.Image, size: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Return some (row, column) for the sprite's corner, with all of it inside the picture."""
    free = (size - sprite.height + 1, size - sprite.width + 1)
    places = rng.integers(free, size=(_TRIED_PLACES, 2))
    return [(int(top), int(left)) for top, left in places]


def window(at: tuple[int, int], sprite: Image.Image) -> tuple[slice, slice]:
    """Return the rows and columns that a sprite covers if its corner is at (row, column)."""
    top, left = at
    return slice(top, top + sprite.height), slice(left, left + sprite.width)


def freest_place(
    sprite: Image.Image, annotation: np.ndarray, rng: np.random.Generator
) -> tuple[int, int]:
    """Return the one of some random places with the fewest pixels that objects have taken.

    Args:
        sprite: Object to place.
        annotation: Picture [size, size] that is 0 where there is no object.
        rng: Draws the places.
    """
    taken = annotation > 0
    places = random_places(sprite, len(annotation), rng)
    return min(places, key=lambda at: taken[window(at, sprite)].sum())


def paste_sprite(
    scene: Image.Image, annotation: np.ndarray, sprite: Image.Image, at: tuple[int, int], label: int
) -> None:
    """Draw a sprite into a scene and its label into the annotation, both in place.

    Edges are blended by alpha. The annotation gets the label where alpha is at least a half.
    """
    alpha = sprite.getchannel("A")
    scene.paste(sprite.convert("RGB"), (at[1], at[0]), mask=alpha)
    annotation[window(at, sprite)][np.asarray(alpha) >= 128] = label
