"""Images without labels, in one folder and those below it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokendial.data.readers.files import PATH, shown, warn_of_others
from tokendial.data.readers.images import images_in
from tokendial.data.readers.pixels import ValueRange, check_range, named, warn_of_unused_range
from tokendial.data.sets.labelled import Broken, Files, check_broken, whole_images
from tokendial.data.splits import Splits
from tokendial.methods import register


@register("data", "unlabelled")
@dataclass(frozen=True, kw_only=True, slots=True)
class Unlabelled:
    """Every image below `root`; enough to train a compensator."""

    root: str = field(metadata=PATH)
    """Folder of images, with folders in it or without."""
    val_every: int = 20
    """One image in so many is for validation."""
    broken: Broken = "error"
    """What to do about images that cannot be read; every one is read before the run begins. error:
    stop, with a line about each; skip: report them and leave them out."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        check_broken(self.broken)
        if self.val_every < 2:
            raise ValueError(f"val_every must be at least 2, got {self.val_every}.")
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files and read every image.

        Raises:
            ValueError: If the folder does not exist, or holds fewer than two images; if one cannot
                be read and `broken` does not say to skip it; or nothing says what is black and
                white.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root: no such folder: {shown(root)}.")
        others: Counter[str] = Counter()
        files = images_in(root, others)
        warn_of_others(others, "image", root)
        if len(files) < 2:
            raise ValueError(f"data.root: {root} must hold at least 2 images, got {len(files)}.")
        val = [(file, 0) for file in files[:: self.val_every]]
        train = [(file, 0) for number, file in enumerate(files) if number % self.val_every]
        warn_of_unused_range(named(files), self.range, root)
        whole = whole_images(root, [train, val], self.broken, self.range)
        of_train, of_val = (Files(part, self.range) for part in whole)
        return Splits(train=of_train, val=of_val, classes=())
