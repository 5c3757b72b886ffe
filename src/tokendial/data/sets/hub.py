"""Data sets of Hugging Face's library `datasets`: saved in a folder, or on the hub."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tokendial.data.readers.files import PATH
from tokendial.data.readers.images import decode_image, read_image
from tokendial.data.readers.pixels import (
    ValueRange,
    check_range,
    sample_evenly,
    warn_of_unused_range,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

_MAX_NAMES = 5


@register("data", "hf")
@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFace:
    """A Hugging Face data set with an image and a label column; needs `tokendial[hf]`."""

    path: str = field(metadata=PATH)
    """Folder written by `DatasetDict.save_to_disk`, or the name of a data set on the hub, which is
    downloaded."""
    subset: str | None = None
    """Configuration of a data set on the hub. null: its default configuration."""
    revision: str | None = None
    """Commit, branch or tag of a data set on the hub. null: the newest version; only a commit makes
    runs repeatable."""
    train: str = "train"
    """Name of the training split."""
    val: str = "validation"
    """Name of the validation split."""
    image: str = "image"
    """Name of the column that holds the images."""
    label: str = "label"
    """Name of the column that holds the labels: class labels with names, or whole numbers."""
    range: ValueRange = None
    """Values that become black and white in grey images of more than 8 bits, such as [0, 4095].
    image: the smallest and largest value of each image; null: the limits of the file's number
    type."""

    def __post_init__(self) -> None:
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """Open the data set; one on the hub is downloaded first.

        Raises:
            ValueError: If `datasets` is not installed, the data set cannot be opened, a split or
                column is missing, a column has the wrong type, an image has no label, or images
                need `range` and it is null.
        """
        splits = self._open()
        for setting in ("train", "val"):
            if (name := getattr(self, setting)) not in splits:
                raise ValueError(
                    f"data.{setting}: {self.path} has no split {name!r}; "
                    f"it has {', '.join(splits)}."
                )
        train, val = (self._read_split(splits[name]) for name in (self.train, self.val))
        names, val_names = (
            getattr(splits[name].features[self.label], "names", None)
            for name in (self.train, self.val)
        )
        if val_names is not None and names is not None and val_names != names:
            raise ValueError(
                f"data.label: the splits {self.train} and {self.val} of {self.path} must have the "
                f"same classes in the same order, got {_join_first(names)} and "
                f"{_join_first(val_names)}."
            )
        if names is None:
            names = [f"class {number}" for number in range(max(train.labels) + 1)]
        for split in (train, val):
            if bad := sorted({label for label in split.labels if not 0 <= label < len(names)}):
                raise ValueError(
                    f"data.label: labels of {self.path} must lie in [0, {len(names) - 1}], "
                    f"got {bad[0]}."
                )
        sources = map(train.source, sample_evenly(range(len(train))))
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
        except (IndexError, OSError, ValueError) as error:  # IndexError: empty saved split
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"data.path: {self.path} cannot be opened ({reason}).") from None
        if not isinstance(found, datasets.DatasetDict):
            raise ValueError(
                f"data.path: {self.path} must hold splits, as a DatasetDict does, "
                f"got a {type(found).__name__}."
            )
        return dict(found)

    def _read_split(self, split: Any) -> "_Rows":
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
        # Images stay encoded, so that `readers.images` decodes them like those of other data sets.
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


def _join_first(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


class _Rows(Dataset[tuple[Image.Image, int]]):
    """Images of a column, each decoded when it is requested."""

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
        """Return the name of an image in errors, and its file or encoded content."""
        image = self.rows[index][self.column] or {"bytes": b"", "path": None}
        if image["bytes"] is None:
            return image["path"], Path(image["path"])
        return f"{self.name}, row {index}", BytesIO(image["bytes"])
