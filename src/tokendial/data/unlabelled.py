"""Images without labels, in one folder and those below it."""

from dataclasses import dataclass
from pathlib import Path

from tokendial.data.images import images_in
from tokendial.data.labelled import Files
from tokendial.data.pixels import ValueRange, check_range, named, warn_of_unused_range
from tokendial.data.splits import Splits
from tokendial.methods import register


@register("data", "unlabelled")
@dataclass(frozen=True, kw_only=True, slots=True)
class Unlabelled:
    """Every image below `root`; enough to train a compensator."""

    root: str
    """Folder of images, with folders in it or without."""
    val_every: int = 20
    """One image in so many is for validation."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        if self.val_every < 2:
            raise ValueError(f"val_every must be at least 2, got {self.val_every}.")
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files.

        Raises:
            ValueError: If the folder does not exist, or holds fewer than two images, or nothing
                says what is black and white.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root: no such folder: {root}.")
        files = images_in(root)
        if len(files) < 2:
            raise ValueError(f"data.root: {root} must hold at least 2 images, got {len(files)}.")
        val = [(file, 0) for file in files[:: self.val_every]]
        train = [(file, 0) for number, file in enumerate(files) if number % self.val_every]
        warn_of_unused_range(named(files), self.range, root)
        return Splits(train=Files(train, self.range), val=Files(val, self.range), classes=())
