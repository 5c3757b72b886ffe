"""Small real images: pieces of the photographs that are shipped."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BACKGROUNDS = Path(__file__).parents[2] / "src" / "tokendial" / "assets" / "backgrounds"
SIDE = 32


@pytest.fixture(scope="session")
def pieces() -> np.ndarray:
    """[48, 32, 32, 3] uint8, all different."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [np.asarray(Image.open(BACKGROUNDS / f"{name}.jpg").convert("RGB")) for name in names]
    corners = [(SIDE * row, SIDE * column) for row in range(1, 4) for column in range(1, 5)]
    found = [photo[y : y + SIDE, x : x + SIDE] for photo in photos for y, x in corners]
    assert len({piece.tobytes() for piece in found}) == len(found) == 48
    return np.stack(found)


@pytest.fixture
def save(tmp_path, pieces) -> Callable[[Iterable[str]], Path]:
    """Writes images under names below a folder, number i the i-th piece; gives the folder."""

    def write(names: Iterable[str]) -> Path:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pieces[number % len(pieces)]).save(path)
        return tmp_path

    return write


@pytest.fixture
def shows(pieces) -> Callable[[Image.Image, int], bool]:
    """Whether an image is the piece of that number, but for what JPEG has changed."""

    def same(image: Image.Image, number: int) -> bool:
        errors = np.abs(np.asarray(image).astype(int) - pieces).mean(axis=(1, 2, 3))
        return bool(errors.argmin() == number)

    return same
