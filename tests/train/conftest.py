"""A real image folder (digits of scikit-learn), a recipe for it, and a finished run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tokendial.train import Run, read_recipe, train

RECIPE = {
    "seed": 1,
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": None,
        "img_size": 32,
        "args": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
    },
    "reduce": {"name": "tome", "r": 2},
    "adapt": {"name": "full"},
    "data": {"name": "image_folder", "root": None},
    "augment": {"crop": False, "flip": 0.0},
    "train": {"epochs": 8, "batch_size": 20, "lr": 0.003, "warmup_epochs": 1},
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Folder with 4 classes, 60 training and 20 validation images each."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for digit in range(4):
        pictures = data.images[data.target == digit]
        for split, part in (("train", pictures[:60]), ("val", pictures[60:80])):
            folder = root / split / f"digit {digit}"
            folder.mkdir(parents=True)
            for number, picture in enumerate(part):
                grey = Image.fromarray((picture * 15.9).astype(np.uint8)).resize((32, 32))
                grey.save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def recipe_file(digits, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "digits.yaml"
    path.write_text(
        yaml.safe_dump(RECIPE | {"data": {"name": "image_folder", "root": str(digits)}})
    )
    return path


@pytest.fixture(scope="session")
def run(recipe_file, tmp_path_factory) -> Run:
    output = tmp_path_factory.mktemp("runs") / "run"
    return train(read_recipe(recipe_file, [f"output={output}"]), quiet=True)


@pytest.fixture
def in_two_processes() -> list[str]:
    """What stands before `-m MODULE ...`: Accelerate's launcher, on a port that is free.

    It starts several processes only if told that they are for GPUs; ACCELERATE_USE_CPU has the
    last word.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0"]
