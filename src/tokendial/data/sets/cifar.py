"""CIFAR-100: 60,000 images of 32x32 pixels in 100 classes.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The set is published as
Python pickles, and loading a pickle can run any program. So it is read by an unpickler that accepts
plain containers and NumPy arrays of bytes and refuses everything else. The arrays are built here:
NumPy's own unpickling takes flags from the file, and wrong flags make it use file content as memory
addresses. torchvision accepts files with the published MD5 only, so it cannot read a part of the
set.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tokendial.data.readers.lists import require_file
from tokendial.data.sets.labelled_images import ImageArrays
from tokendial.data.sets.official import OfficialSet
from tokendial.data.splits import Splits
from tokendial.methods import register

_NUM_CLASSES = 100
_LABELS = range(_NUM_CLASSES)
_SIDE = 32
_SOURCE = (
    "CIFAR-100's python version, https://www.cs.toronto.edu/~kriz/cifar.html, holds "
    "cifar-100-python/{train,test,meta}."
)
# Exceptions of unpickling on damaged files, from the documentation of pickle and from experiments.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError,
    OverflowError, TypeError, ValueError,
)  # fmt: skip


@register("data", "cifar100")
@dataclass(frozen=True, kw_only=True, slots=True)
class CIFAR100(OfficialSet):
    """CIFAR-100 with its 100 fine labels; `root` is the folder `cifar-100-python` or holds it."""

    def build(self, seed: int) -> Splits:
        """Read the set into memory (180 MB).

        Raises:
            ValueError: If a file is missing, has the wrong content, or does not hold the published
                number of images.
        """
        folder = Path(self.root)
        if (inner := folder / "cifar-100-python").is_dir():
            folder = inner
        names = _read_pickle(folder / "meta").get("fine_label_names")
        if not isinstance(names, list) or len(names) != _NUM_CLASSES:
            raise ValueError(f"data: {folder / 'meta'} must name {_NUM_CLASSES} fine labels.")
        train, test = (_read_images(folder / name) for name in ("train", "test"))
        self.check_count(f"number of images in {folder / 'train'}", len(train), 50_000)
        self.check_count(f"number of images in {folder / 'test'}", len(test), 10_000)
        return self.splits(train, test, names, seed)


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return a pickled dictionary of lists and arrays by name.

    Raises:
        ValueError: If the file is missing or damaged, or holds objects of other types.
    """
    require_file(path, _SOURCE)
    try:
        with path.open("rb") as file:
            # The official files were written by Python 2, whose strings are bytes.
            content = _Unpickler(file, encoding="latin1").load()
        return {
            name: value.array() if isinstance(value, _PickledArray) else value
            for name, value in content.items()
        }
    except _UNPICKLING_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"data: {path} is not a file of CIFAR-100 ({reason}).") from None


class _PickledDType:
    """Stands for a NumPy dtype while a pickle is loaded; keeps its type code, such as "u1"."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignore the state (byte order and alignment): arrays of bytes have neither."""


class _PickledArray:
    """Stands for a NumPy array while a pickle is loaded; keeps its state unchecked."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Build the array from the state.

        Raises:
            ValueError: If its elements are not bytes in C order.
        """
        _, shape, dtype, fortran, content = self.state
        if dtype.code != "u1" or fortran:
            raise ValueError("its images are not bytes in C order")
        # The strings of Python 2 are loaded as text.
        data = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(data, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Unpickler that creates the listed classes and refuses all others."""

    allowed: ClassVar = {
        "numpy.core.multiarray._reconstruct": _PickledArray,
        "numpy._core.multiarray._reconstruct": _PickledArray,  # as NumPy 2 writes it
        "numpy.ndarray": _PickledArray,
        "numpy.dtype": _PickledDType,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _read_images(path: Path) -> ImageArrays:
    content = _read_pickle(path)
    pixels, labels = content.get("data"), content.get("fine_labels")
    width = 3 * _SIDE * _SIDE
    if (
        not isinstance(pixels, np.ndarray)
        or not isinstance(labels, list)
        or pixels.shape != (len(labels), width)
    ):
        raise ValueError(
            f"data: {path} must hold data, uint8 [images, {width}], and as many fine_labels."
        )
    if bad := [label for label in labels if type(label) is not int or label not in _LABELS]:
        raise ValueError(
            f"data: {path}: fine_labels must lie in [0, {_NUM_CLASSES - 1}], got {bad[0]!r}."
        )
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return ImageArrays(np.ascontiguousarray(images), np.array(labels, np.int64))
