"""Fixtures of small real images: pieces of the shipped photographs."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from layouts import pieces_of_photographs, write_images, write_stamps
from PIL import Image


@pytest.fixture(scope="session")
def pieces() -> np.ndarray:
    """48 different images [48, 32, 32, 3] uint8."""
    return pieces_of_photographs()


@pytest.fixture
def save(tmp_path, pieces) -> Callable[[Iterable[str]], Path]:
    """Function that writes the i-th piece under the i-th name; returns the folder."""
    return partial(write_images, tmp_path, pieces)


@pytest.fixture
def shows(pieces) -> Callable[[Image.Image, int], bool]:
    """Function that returns whether an image is a given piece, up to JPEG noise."""

    def same(image: Image.Image, number: int) -> bool:
        errors = np.abs(np.asarray(image).astype(int) - pieces).mean(axis=(1, 2, 3))
        return bool(errors.argmin() == number)

    return same


@pytest.fixture(scope="session")
def stamp_folder(tmp_path_factory) -> Path:
    """Folder of objects with alpha, as Debian's stamps are."""
    return write_stamps(tmp_path_factory.mktemp("stamps"))
