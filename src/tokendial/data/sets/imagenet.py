"""ImageNet-1k: 1.28 million photographs in 1,000 classes, named by their WordNet ids.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tokendial.data.readers.files import PATH
from tokendial.data.readers.images import images_in
from tokendial.data.sets.folder import list_folders
from tokendial.data.sets.labelled import Files, check_count, read_lines, whole_images
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "ImageNet-1k, https://image-net.org, has a folder for each WordNet id once its archives are "
    "unpacked and the validation images are sorted into such folders, too."
)


@register("data", "imagenet")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageNet:
    """Images in `root/train/WNID/` and `root/val/WNID/`; classes are numbered by these ids."""

    root: str = field(metadata=PATH)
    """Folder that holds train and val."""
    classes: str | None = field(default=None, metadata=PATH)
    """File of names: lines of a WordNet id and a name, such as "n01440764 tench, Tinca tinca";
    null: the ids are the names."""
    check: bool = True
    """Whether the numbers of images and classes must be those of the whole set; false: parts of
    it will do."""

    def build(self, seed: int) -> Splits:
        """List the files and read every image.

        Raises:
            ValueError: If a folder is missing or empty, there are more or fewer images or classes
                than published, an image cannot be read, or the file of names lacks a name.
        """
        root = Path(self.root)
        try:
            of_train, of_val, wnids = list_folders(
                root / "train", root / "val", images_in, "images"
            )
        except ValueError as error:
            raise ValueError(f"{error} {_SOURCE}") from None
        train, val = map(Files, whole_images(root, [of_train, of_val]))
        for files, split, size in ((train, "train", 1_281_167), (val, "val", 50_000)):
            for what, got, expected in (
                ("classes", len(set(files.labels)), 1000),
                ("images", len(files), size),
            ):
                check_count(f"number of {what} in {root / split}", got, expected, strict=self.check)
        classes = wnids if self.classes is None else _names(Path(self.classes), wnids)
        return Splits(train=train, val=val, classes=classes)


def _names(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    names = {}
    for place, line in read_lines(path, "data.classes may also be null."):
        wnid, *name = line.split(maxsplit=1)
        if not name:
            raise ValueError(f"data.classes: {place}: must be an id and a name, got {line!r}.")
        names[wnid] = name[0]
    if missing := [wnid for wnid in wnids if wnid not in names]:
        raise ValueError(f"data.classes: {path} has no name for {missing[0]}.")
    return tuple(names[wnid] for wnid in wnids)
