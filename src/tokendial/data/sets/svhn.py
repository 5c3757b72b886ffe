"""SVHN: digits of house numbers, 32x32 pixels each.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokendial.data.readers.matlab import read_mat
from tokendial.data.sets.labelled_images import ImageArrays
from tokendial.data.sets.official import OfficialSet
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "SVHN's format 2, http://ufldl.stanford.edu/housenumbers, is {train,test,extra}_32x32.mat."
)
_SIZES = {"train": 73_257, "test": 26_032, "extra": 531_131}


@register("data", "svhn")
@dataclass(frozen=True, kw_only=True, slots=True)
class SVHN(OfficialSet):
    """SVHN's cropped digits: `root/{train,test,extra}_32x32.mat`."""

    extra: bool = False
    """Whether to train on the 531,131 easier images of extra_32x32.mat as well."""

    def build(self, seed: int) -> Splits:
        """Read the set into memory (300 MB, with `extra` 1.9 GB).

        Raises:
            ValueError: If a file is missing, has the wrong content, or does not hold the published
                number of images.
        """
        images, labels = self._read_split("train")
        if self.extra:
            more_images, more_labels = self._read_split("extra")
            images = np.concatenate([images, more_images])
            labels = np.concatenate([labels, more_labels])
        test = ImageArrays(*self._read_split("test"))
        return self.splits(ImageArrays(images, labels), test, list("0123456789"), seed)

    def _read_split(self, split: str) -> tuple[np.ndarray, np.ndarray]:
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
        # Images are read one by one, so each is made contiguous. The digit 0 is stored as 10.
        return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10
