"""A recipe for the image folder of digits, and a finished run."""

import sys
from pathlib import Path

import pytest
import yaml

from tokendial.runs import Run, read_recipe
from tokendial.train import train

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
