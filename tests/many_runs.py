"""Helpers for tests of sweeps: a tiny recipe, and readers of printed lines and written files."""

import csv
from pathlib import Path

TINY = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": None,
        "img_size": 16,
        "args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    },
    "adapt": {"name": "adaptformer", "dim": 2},
    "augment": {"crop": False, "flip": 0.0},
    "train": {"epochs": 1, "batch_size": 8},
}


def trained(output: str) -> list[str]:
    """The runs whose training a command says that it started."""
    return [line.partition(": ")[0] for line in output.splitlines() if ": training, " in line]


def marks(folder: Path) -> dict[Path, tuple[int, int]]:
    """Modification times of the files below a folder, by path."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))
