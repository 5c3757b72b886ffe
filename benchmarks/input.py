"""Fraction of the time that fine-tuning waits for images, and images/s that one core decodes.

ViT-B/16 at 224 pixels is fine-tuned (recipes/image_folder.yaml) on JPEGs of 500 x 375 pixels, the
usual size in ImageNet. They are written first, from scikit-image's images. Every number of loading
processes trains the same updates.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from benchmarks.alternating import Runner, alternate, seconds
from benchmarks.options import add_model, comma_separated, options, parse_options
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report, Row
from tokendial.data.readers.images import read_image
from tokendial.data.sets.folder import ImageFolder
from tokendial.data.transforms.image import Augment, train_transform
from tokendial.runs import Run, read_recipe
from tokendial.train import train

PICTURES = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (500, 375)


def write_images(root: Path, count: int) -> None:
    """Write random crops of real images as JPEGs, in two classes."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in PICTURES]
    for split, number in (("train", count), ("val", 2)):
        for index in range(number):
            picture = pictures[index % len(pictures)]
            left, top = (int(draw.integers(0, side // 4)) for side in picture.size)
            crop = picture.crop((left, top, *picture.size)).resize(SIZE)
            path = root / split / f"class {index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop.save(path, quality=90)


def decoding(root: Path) -> None:
    """Read, randomly crop and resize every image."""
    transform = train_transform(Augment(), (224, 224), (0.5,) * 3, (0.5,) * 3)
    train: Any = ImageFolder(root=str(root)).build(0).train
    for path, _ in train.files:
        transform(read_image(path))


def train_model(root: Path, folder: Path, workers: int, asked: argparse.Namespace) -> Run:
    """Train for two epochs, and return the run."""
    settings = {
        "data.root": root,
        "output": folder,
        "model.name": asked.model,
        "model.weights": "null",
        "train.epochs": 2,
        "train.warmup_epochs": 0,
        "train.batch_size": asked.batch,
        "train.workers": workers,
        "train.evaluate": "last",
        "train.trackers": "[]",
    }
    if asked.img_size:
        settings["model.img_size"] = asked.img_size
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return train(read_recipe("image_folder", overrides), quiet=True)


def measure(root: Path, runs: Path, asked: argparse.Namespace) -> list[Row]:
    """One row per number of workers: waiting in the second epoch, and speed of the whole run."""
    ran: dict[int, list[Run]] = {workers: [] for workers in asked.workers}

    def run(workers: int) -> None:
        folder = runs / f"{workers}-{len(ran[workers])}"
        ran[workers].append(train_model(root, folder, workers, asked))

    runners = {n: Runner(lambda n=n: run(n)) for n in asked.workers}
    turns = alternate(runners, repeats=asked.repeats, warm_up=0)
    return [
        {
            "workers": workers,
            "data_wait": float(np.median([run.metrics()[-1]["data_wait"] for run in ran[workers]])),
            "images_per_s": 2 * asked.images / seconds(turns[workers]),
        }
        for workers in asked.workers
    ]


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("input", __doc__, repeats=1)
    add_model(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--workers", type=comma_separated(int), default=[0, 1, 2])
    asked = parse_options(parser, arguments, batch=2, images=4, workers=[0])
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "images"
        write_images(root, asked.images)
        turns = alternate({"decoding": Runner(lambda: decoding(root))}, repeats=3)
        decoded = asked.images / seconds(turns["decoding"])
        rows = measure(root, Path(temporary), asked)
    columns = (
        Column("workers", "loading processes"),
        Column("data_wait", "waits", "{:.1%}"),
        Column("images_per_s", "images/s", "{:.2f}"),
    )
    notes = [f"one core reads, crops and resizes {decoded:.0f} images/s"]
    figure = bar_figure(
        rows, "workers", {"data_wait": "fraction of waiting", "images_per_s": "images/s"}
    )
    Report(f"input_{asked.model}", columns, rows, figure, notes).write(asked)
