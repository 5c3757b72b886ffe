"""ImageNet-1k: 1.28 million photographs in 1,000 classes, named by their WordNet ids.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tokendial.data.readers.files import PATH
from tokendial.data.readers.images import list_images
from tokendial.data.readers.lists import read_lines
from tokendial.data.sets.folder import list_folders
from tokendial.data.sets.labelled_images import ImageFiles, drop_broken_images
from tokendial.data.sets.official import check_count
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "ImageNet-1k, https://image-net.org, has a folder for each WordNet id once its archives are "
    "unpacked and the validation images are sorted into such folders, too."
)


@register("data", "imagenet")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageNet:
    """ImageNet-1k: `root/train/WNID/` and `root/val/WNID/`, classes in the order of WordNet ids."""

    root: str = field(metadata=PATH)
    """Folder that holds the folders `train` and `val`."""
    classes: str | None = field(default=None, metadata=PATH)
    """Text file of class names, each line a WordNet id and a name, such as "n01440764 tench, Tinca
    tinca". null: the ids are the names."""
    check: bool = True
    """Whether the numbers of images and classes must be those of the published data set. Set to
    false to use a part of it."""

    def build(self, seed: int) -> Splits:
        """List the files and decode every image.

        Raises:
            ValueError: If a folder is missing or empty, there are more or fewer images or classes
                than published, an image cannot be read, or a class has no name in `classes`.
        """
        root = Path(self.root)
        try:
            train_files, val_files, wnids = list_folders(
                root / "train", root / "val", list_images, "images"
            )
        except ValueError as error:
            raise ValueError(f"{error} {_SOURCE}") from None
        train, val = map(ImageFiles, drop_broken_images(root, [train_files, val_files]))
        for files, split, size in ((train, "train", 1_281_167), (val, "val", 50_000)):
            for what, got, expected in (
                ("classes", len(set(files.labels)), 1000),
                ("images", len(files), size),
            ):
                check_count(f"number of {what} in {root / split}", got, expected, strict=self.check)
        classes = wnids if self.classes is None else _read_names(Path(self.classes), wnids)
        return Splits(train=train, val=val, classes=classes)


def _read_names(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    names = {}
    for place, line in read_lines(path, "data.classes may also be null."):
        wnid, *name = line.split(maxsplit=1)
        if not name:
            raise ValueError(f"data.classes: {place}: must be an id and a name, got {line!r}.")
        names[wnid] = name[0]
    if missing := [wnid for wnid in wnids if wnid not in names]:
        raise ValueError(f"data.classes: {path} has no name for {missing[0]}.")
    return tuple(names[wnid] for wnid in wnids)
