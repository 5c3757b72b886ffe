"""SVHN: digits of house numbers, 32x32 pixels each.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokendial.data.readers.matlab import read_mat
from tokendial.data.sets.labelled import Arrays, OfficialSet
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "SVHN's format 2, http://ufldl.stanford.edu/housenumbers, is {train,test,extra}_32x32.mat."
)
_SIZES = {"train": 73_257, "test": 26_032, "extra": 531_131}


@register("data", "svhn")
@dataclass(frozen=True, kw_only=True, slots=True)
class SVHN(OfficialSet):
    """The official cropped digits: `root/{train,test,extra}_32x32.mat`."""

    extra: bool = False
    """Whether the 531,131 easier images of extra_32x32.mat are trained on, too."""

    def build(self, seed: int) -> Splits:
        """Read the set into memory (300 MB, with `extra` 1.9 GB).

        Raises:
            ValueError: If a file is missing, is not what it should be, or holds another number of
                images than the published one.
        """
        images, labels = self._read("train")
        if self.extra:
            more_images, more_labels = self._read("extra")
            images = np.concatenate([images, more_images])
            labels = np.concatenate([labels, more_labels])
        test = Arrays(*self._read("test"))
        return self.splits(Arrays(images, labels), test, list("0123456789"), seed)

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        path = Path(self.root) / f"{split}_32x32.mat"
        images, labels = read_mat(path, _SOURCE, "X", "y")
        if images.shape != (32, 32, 3, len(labels)) or images.dtype != np.uint8:
            raise ValueError(
                f"data: {path} must hold X, uint8 [32, 32, 3, images], and as many labels y, "
                f"got {images.dtype} {list(images.shape)} and {len(labels)}."
            )
        if bad := sorted(set(labels.tolist()) - set(range(1, 11))):
            raise ValueError(f"data: {path}: y must lie in [1, 10], got {bad[0]}.")
        self.check_count(f"number of images in {path}", len(labels), _SIZES[split])
        # Each image in one piece, as it is read one by one; the digit 0 is stored as 10.
        return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10
