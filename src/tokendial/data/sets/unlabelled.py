"""Images without labels, in one folder and those below it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokendial.data.readers.files import PATH, format_path, warn_of_other_files
from tokendial.data.readers.images import list_images
from tokendial.data.readers.pixels import (
    ValueRange,
    check_range,
    sample_files,
    warn_of_unused_range,
)
from tokendial.data.sets.labelled_images import (
    Broken,
    ImageFiles,
    check_broken,
    drop_broken_images,
)
from tokendial.data.splits import Splits
from tokendial.methods import register


@register("data", "unlabelled")
@dataclass(frozen=True, kw_only=True, slots=True)
class Unlabelled:
    """All images below a folder, without labels.

    They are enough to train a compensator, or an adapter that keeps a backbone's embeddings.
    """

    root: str = field(metadata=PATH)
    """Folder of the images; it is searched recursively."""
    val_every: int = 20
    """Every how many images one is used for validation: 20 takes the 1st, 21st, 41st, ..."""
    broken: Broken = "error"
    """What to do with images that cannot be read. Every image is decoded before the run begins.
    error: log each broken image and stop; skip: log each broken image and leave it out."""
    range: ValueRange = None
    """Values that become black and white in grey images of more than 8 bits, such as [0, 4095].
    image: the smallest and largest value of each image; null: the limits of the file's number
    type."""

    def __post_init__(self) -> None:
        check_broken(self.broken)
        if self.val_every < 2:
            raise ValueError(f"val_every must be at least 2, got {self.val_every}.")
        check_range(self.range)

    def build(self, seed: int) -> Splits:
        """List the files and decode every image.

        Raises:
            ValueError: If the folder does not exist or holds fewer than two images, if an image
                cannot be read and `broken` is "error", or if images need `range` and it is null.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root: no such folder: {format_path(root)}.")
        other_suffixes: Counter[str] = Counter()
        files = list_images(root, other_suffixes)
        warn_of_other_files(other_suffixes, "image", root)
        if len(files) < 2:
            raise ValueError(f"data.root: {root} must hold at least 2 images, got {len(files)}.")
        val = [(file, 0) for file in files[:: self.val_every]]
        train = [(file, 0) for number, file in enumerate(files) if number % self.val_every]
        warn_of_unused_range(sample_files(files), self.range, root)
        train, val = drop_broken_images(root, [train, val], self.broken, self.range)
        return Splits(
            train=ImageFiles(train, self.range), val=ImageFiles(val, self.range), classes=()
        )
