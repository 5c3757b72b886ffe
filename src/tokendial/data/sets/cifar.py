"""CIFAR-100: 60,000 images of 32x32 pixels in 100 classes.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The set is published as
Python pickles, and a pickle can run any program when it is read. It is therefore read by an
unpickler that knows plain containers and refuses everything else; arrays are put together here,
because NumPy's own way takes flags from the file that make it use any bytes as addresses.
torchvision trusts files whose MD5 is right, so it can read nothing but the whole set.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tokendial.data.sets.labelled import Arrays, OfficialSet, required_file
from tokendial.data.splits import Splits
from tokendial.methods import register

_CLASSES = 100
_LABELS = range(_CLASSES)
_SIDE = 32
_SOURCE = (
    "CIFAR-100's python version, https://www.cs.toronto.edu/~kriz/cifar.html, holds "
    "cifar-100-python/{train,test,meta}."
)
# What unpickling raises on damaged files, by the documentation of the module and by trying.
_BROKEN = (
    pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError,
    OverflowError, TypeError, ValueError,
)  # fmt: skip


@register("data", "cifar100")
@dataclass(frozen=True, kw_only=True, slots=True)
class CIFAR100(OfficialSet):
    """The official `cifar-100-python`, in `root` or as `root` itself, with the 100 fine labels."""

    def build(self, seed: int) -> Splits:
        """Read the set into memory (180 MB).

        Raises:
            ValueError: If a file is missing, is not what it should be, or holds another number of
                images than the published one.
        """
        folder = Path(self.root)
        if (inner := folder / "cifar-100-python").is_dir():
            folder = inner
        names = _read_pickle(folder / "meta").get("fine_label_names")
        if not isinstance(names, list) or len(names) != _CLASSES:
            raise ValueError(f"data: {folder / 'meta'} must name {_CLASSES} fine labels.")
        train, test = (_read(folder / name) for name in ("train", "test"))
        self.check_count(f"number of images in {folder / 'train'}", len(train), 50_000)
        self.check_count(f"number of images in {folder / 'test'}", len(test), 10_000)
        return self.splits(train, test, names, seed)


def _read_pickle(path: Path) -> dict[str, Any]:
    """A pickled mapping of texts to lists and arrays.

    Raises:
        ValueError: If the file is missing, damaged, or asks for anything else.
    """
    required_file(path, _SOURCE)
    try:
        with path.open("rb") as file:
            # The official files were written by Python 2, whose texts are bytes.
            found = _Unpickler(file, encoding="latin1").load()
        return {
            name: value.array() if isinstance(value, _PickledArray) else value
            for name, value in found.items()
        }
    except _BROKEN as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"data: {path} is not a file of CIFAR-100 ({reason}).") from None


class _PickledDType:
    """What the type of a pickled array says of itself."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


class _PickledArray:
    """What a pickled array says of itself."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: If its elements are no bytes, in C's order.
        """
        _, shape, dtype, fortran, content = self.state
        if dtype.code != "u1" or fortran:
            raise ValueError("its images are no bytes in C's order")
        # Python 2's bytes come as text.
        data = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(data, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
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


def _read(path: Path) -> Arrays:
    found = _read_pickle(path)
    pixels, labels = found.get("data"), found.get("fine_labels")
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
            f"data: {path}: fine_labels must lie in [0, {_CLASSES - 1}], got {bad[0]!r}."
        )
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Arrays(np.ascontiguousarray(images), np.array(labels, np.int64))
