"""Shared fields and checks of data sets that are published as a training and a test set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.utils.data import Subset

from tokendial.checks import check_choice
from tokendial.data.readers.files import PATH
from tokendial.data.sets.labelled_images import ImageArrays, ImageFiles, drop_broken_images
from tokendial.data.splits import Splits, hold_out


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSet:
    """Fields of data sets that are published as a training and a test set."""

    root: str = field(metadata=PATH)
    """Folder of the data set."""
    val: Literal["val", "test"] = "test"
    """Images to validate on. val: images held out of the training set, for choosing settings; test:
    the official test set, for the final run."""
    holdout: float = 0.0
    """Fraction of the training images, in [0, 1), that is held out of training. It is drawn class
    by class with the recipe's seed. `val: val` validates on it; `val: test` leaves it unused."""
    check: bool = True
    """Whether the numbers of images and classes must be those of the published data set. Set to
    false to use a part of it."""

    def __post_init__(self) -> None:
        check_choice("val", self.val, ("val", "test"))
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}.")

    def check_count(self, name: str, got: int, expected: int) -> None:
        """Check a number of images or classes, strictly if the field `check` is set."""
        check_count(name, got, expected, strict=self.check)

    def splits(
        self,
        train: ImageFiles | ImageArrays,
        test: ImageFiles | ImageArrays,
        classes: Sequence[str],
        seed: int,
    ) -> Splits:
        """Hold out training images and choose what to validate on; images in files are decoded.

        Raises:
            ValueError: If `val` is "val" and nothing is held out, or if an image cannot be read.
        """
        files = [part.files for part in (train, test) if isinstance(part, ImageFiles)]
        drop_broken_images(Path(self.root), files)
        kept, held = hold_out(train.labels, self.holdout, seed)
        if self.val == "val" and not held:
            raise ValueError(
                f"data.holdout must hold out at least one image for data.val=val, "
                f"got {self.holdout}."
            )
        return Splits(
            train=Subset(train, kept) if held else train,
            val=Subset(train, held) if self.val == "val" else test,
            classes=tuple(classes),
        )


def check_count(name: str, got: int, expected: int, *, strict: bool) -> None:
    """Check a number of images, videos or classes.

    Args:
        name: What is counted, for the message.
        got: Number that was found.
        expected: Number in the published data set.
        strict: Whether the numbers must be equal; else any number but 0 is accepted.

    Raises:
        ValueError: If the number is not accepted.
    """
    if not got or (strict and got != expected):
        remedy = "; data.check=false accepts a part of the data set" if got else ""
        raise ValueError(f"data: {name} must be {expected:,}, got {got:,}{remedy}.")
