import gc
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from coverage import Coverage
from examples import tiny_vit
from hypothesis import settings
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from tokendial.cli import main
from tokendial.runs import Run, read_recipe
from tokendial.train import train

# The same examples in every run, and no limit on their time: the machine may be busy.
settings.register_profile("tokendial", derandomize=True, deadline=None)
settings.load_profile("tokendial")
# nohup makes this process, and those that tests start, ignore SIGHUP; so does a shell with SIGINT
# for what it starts in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# The models are too small for several threads, which would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
# Coverage counts the core only (see the Makefile), and tracing slows Python down by a third or
# more. So tests of these rooms, which lie above the core, run without tracing.
UNTRACED = {
    "benchmarks",
    "data",
    "demo",
    "serve",
    "show",
    "sweeps",
    "runs",
    "runtimes",
    "tasks",
    "train",
    "test_cli.py",
}
UNTRACED |= {"test_compile.py", "test_demo.py", "test_docs.py", "test_export_files.py"}
UNTRACED |= {"test_cli.py", "test_examples.py", "test_reproduce.py"}

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


def pytest_collection_finish():
    """Spare the garbage collector a million objects of imported modules, which all stay."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    coverage = Coverage.current()
    if coverage is None or UNTRACED.isdisjoint(item.path.relative_to(item.config.rootpath).parts):
        return (yield)
    coverage.stop()
    try:
        return (yield)
    finally:
        coverage.start()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """Keep records of checked images out of the user's cache."""
    os.environ["TOKENDIAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def vit() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A real image folder, digits of scikit-learn: 4 classes, 60 + 20 images of each."""
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


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokendial", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


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
    """Command words of Accelerate's launcher, to put before `-m MODULE ...`; on a free port.

    The launcher starts several processes only with --multi_gpu. ACCELERATE_USE_CPU then makes
    them use the CPU.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0"]
