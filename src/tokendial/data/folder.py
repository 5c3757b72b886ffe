"""Image folders: one folder for each split, in it one folder for each class."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from tokendial.data.images import images_in, read_image
from tokendial.data.splits import Splits
from tokendial.methods import register


@register("data", "image_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Images in `root/train/CLASS/` and `root/val/CLASS/`."""

    root: str
    """Folder that holds the splits."""
    train: str = "train"
    """Name of the training folder."""
    val: str = "val"
    """Name of the validation folder."""

    def build(self, seed: int) -> Splits:
        """List the files.

        Raises:
            ValueError: If a folder is missing or empty, or the validation set has a class that
                the training set has not.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root: no such folder: {root}.")
        train, val = (_class_folders(root, name) for name in (self.train, self.val))
        classes = tuple(train)
        if unknown := sorted(set(val) - set(train)):
            raise ValueError(
                f"data.val: class {unknown[0]!r} of {root / self.val} is not in "
                f"{root / self.train}."
            )
        numbers = {name: number for number, name in enumerate(classes)}
        return Splits(train=_Files(train, numbers), val=_Files(val, numbers), classes=classes)


class _Files(Dataset[tuple[Image.Image, int]]):
    def __init__(self, by_class: dict[str, list[Path]], numbers: dict[str, int]) -> None:
        self.files = [(path, numbers[name]) for name, paths in by_class.items() for path in paths]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.files[index]
        return read_image(path), target


def _class_folders(root: Path, split: str) -> dict[str, list[Path]]:
    folder = root / split
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise ValueError(
            f"data: {root} has no folder {split!r}; it has {', '.join(there[:8]) or 'no folders'}."
        )
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ValueError(f"data: {folder} has no class folders.")
    found = {path.name: images_in(path) for path in classes}
    for name, files in found.items():
        if not files:
            raise ValueError(f"data: class folder {folder / name} holds no images.")
    return found
