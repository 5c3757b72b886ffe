"""Sets of Hugging Face's library datasets: folders that it has saved, or sets of its hub."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tokendial.data.readers.files import PATH
from tokendial.data.readers.images import decode_image, read_image
from tokendial.data.readers.pixels import ValueRange, check_range, spread, warn_of_unused_range
from tokendial.data.splits import Splits
from tokendial.methods import register


@register("data", "hf")
@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFace:
    """A column of images and a column of labels; needs `pip install 'tokendial[hf]'`."""

    path: str = field(metadata=PATH)
    """Folder written by `DatasetDict.save_to_disk`, or the name of a set on the hub."""
    subset: str | None = None
    """Which configuration of a set on the hub; null: its default."""
    revision: str | None = None
    """Which commit, branch or tag of a set on the hub; null: the newest. A commit makes runs
    repeatable."""
    train: str = "train"
    """Name of the training split."""
    val: str = "validation"
    """Name of the split to validate on."""
    image: str = "image"
    """Name of the column of images."""
    label: str = "label"
    """Name of the column of labels: of classes with names, or of whole numbers."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """Open the set, and fetch it first if it is one of the hub.

        Raises:
            ValueError: If datasets is not installed, the set cannot be opened, a split or column
                is missing, a column is of another kind, an image has no label, or nothing says
                what is black and white.
        """
        splits = self._open()
        for setting in ("train", "val"):
            if (name := getattr(self, setting)) not in splits:
                raise ValueError(
                    f"data.{setting}: {self.path} has no split {name!r}; "
                    f"it has {', '.join(splits)}."
                )
        train, val = (self._read(splits[name]) for name in (self.train, self.val))
        names, of_val = (
            getattr(splits[name].features[self.label], "names", None)
            for name in (self.train, self.val)
        )
        if of_val is not None and names is not None and of_val != names:
            raise ValueError(
                f"data.label: the splits {self.train} and {self.val} of {self.path} must have the "
                f"same classes in the same order, got {_start(names)} and {_start(of_val)}."
            )
        if names is None:
            names = [f"class {number}" for number in range(max(train.labels) + 1)]
        for split in (train, val):
            if bad := sorted({label for label in split.labels if not 0 <= label < len(names)}):
                raise ValueError(
                    f"data.label: labels of {self.path} must lie in [0, {len(names) - 1}], "
                    f"got {bad[0]}."
                )
        sources = map(train.source, spread(range(len(train))))
        warn_of_unused_range(sources, self.range, self.path)
        return Splits(train=train, val=val, classes=tuple(names))

    def _open(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError:
            raise ValueError("data.name hf needs: pip install 'tokendial[hf]'.") from None
        try:
            if Path(self.path).is_dir():
                found = datasets.load_from_disk(self.path)
            else:
                found = datasets.load_dataset(self.path, self.subset, revision=self.revision)
        except (IndexError, OSError, ValueError) as error:  # IndexError: a saved split is empty
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"data.path: {self.path} cannot be opened ({reason}).") from None
        if not isinstance(found, datasets.DatasetDict):
            raise ValueError(
                f"data.path: {self.path} must hold splits, as a DatasetDict does, "
                f"got a {type(found).__name__}."
            )
        return dict(found)

    def _read(self, split: Any) -> "_Rows":
        import datasets

        for setting in ("image", "label"):
            if (name := getattr(self, setting)) not in split.features:
                raise ValueError(
                    f"data.{setting}: {self.path} has no column {name!r}; it has "
                    f"{', '.join(split.features)}."
                )
        kind = split.features[self.image]
        if not isinstance(kind, datasets.Image):
            raise ValueError(
                f"data.image: column {self.image!r} of {self.path} must hold images, got {kind}."
            )
        if not len(split):
            raise ValueError(f"data: a split of {self.path} holds no images.")
        # Images stay bytes, so that they are decoded as everywhere else.
        images = split.select_columns(self.image).cast_column(
            self.image, datasets.Image(decode=False)
        )
        labels = np.asarray(split.select_columns(self.label)[:][self.label])
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise ValueError(
                f"data.label: column {self.label!r} of {self.path} must hold one whole number for "
                f"each image, got {split.features[self.label]}."
            )
        return _Rows(images, self.image, labels.tolist(), self.path, self.range)


def _start(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


class _Rows(Dataset[tuple[Image.Image, int]]):
    def __init__(
        self, rows: Any, column: str, labels: list[int], name: str, value_range: ValueRange
    ) -> None:
        self.rows, self.column, self.labels, self.name = rows, column, labels, name
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, source = self.source(index)
        if isinstance(source, Path):
            image = read_image(source, self.value_range)
        else:
            image = decode_image(source.getvalue(), name, value_range=self.value_range)
        return image, self.labels[index]

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """What errors call an image, and its file."""
        found = self.rows[index][self.column] or {"bytes": b"", "path": None}
        if found["bytes"] is None:
            return found["path"], Path(found["path"])
        return f"{self.name}, row {index}", BytesIO(found["bytes"])
