"""Small real images: pieces of the photographs that are shipped."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from layouts import pieces_of_photographs, write_images
from PIL import Image


@pytest.fixture(scope="session")
def pieces() -> np.ndarray:
    """[48, 32, 32, 3] uint8, all different."""
    return pieces_of_photographs()


@pytest.fixture
def save(tmp_path, pieces) -> Callable[[Iterable[str]], Path]:
    """Writes images under names below a folder, number i the i-th piece; gives the folder."""
    return partial(write_images, tmp_path, pieces)


@pytest.fixture
def shows(pieces) -> Callable[[Image.Image, int], bool]:
    """Whether an image is the piece of that number, but for what JPEG has changed."""

    def same(image: Image.Image, number: int) -> bool:
        errors = np.abs(np.asarray(image).astype(int) - pieces).mean(axis=(1, 2, 3))
        return bool(errors.argmin() == number)

    return same
