"""What tests of sweeps share: a tiny recipe, the command line started, what it says and leaves."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tokendial

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


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the command line."""
    source = str(Path(tokendial.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "tokendial.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "ignore"},
    )


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for what a process does; an error if it ends, or takes two minutes."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(output: str) -> list[str]:
    """The runs whose training a command says that it started."""
    return [line.partition(": ")[0] for line in output.splitlines() if ": training, " in line]


def marks(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which file stands where, and since when."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))
