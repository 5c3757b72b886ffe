"""Share of the time that fine-tuning waits for images, and images per second of a core's decoding.

    python benchmarks/input.py --workers 0,1,2

ViT-B/16 at 224 is fine-tuned (recipes/image_folder.yaml) on JPEGs of 500 x 375 pixels, as ImageNet
has them, which are written first: scikit-image's pictures. Each number of loading processes trains
the same updates. Results go to benchmarks/results/input_MODEL_HARDWARE_DATE.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from speed import hardware, write_result

from tokendial.data.folder import ImageFolder
from tokendial.data.images import read_image
from tokendial.data.transforms import Augment, train_transform
from tokendial.train import Run, read_recipe, train

PICTURES = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (500, 375)


def write_images(root: Path, count: int) -> None:
    """Real pictures as JPEGs, each crop another one, two classes."""
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


def decoding(root: Path) -> float:
    """Images per second that one core reads, crops at random and resizes."""
    files = [path for path, _ in ImageFolder(root=str(root)).build(0).train.files]
    transform = train_transform(Augment(), (224, 224), (0.5,) * 3, (0.5,) * 3)
    start = time.perf_counter()
    for path in files:
        transform(read_image(path))
    return len(files) / (time.perf_counter() - start)


def measure(
    root: Path, folder: Path, workers: int, options: argparse.Namespace
) -> dict[str, float]:
    """Share of waiting in the second epoch, and speed of the whole run."""
    settings = {
        "data.root": root,
        "output": folder,
        "model.name": options.model,
        "model.weights": "null",
        "train.epochs": 2,
        "train.warmup_epochs": 0,
        "train.batch_size": options.batch,
        "train.workers": workers,
        "train.evaluate": "last",
        "train.trackers": "[]",
    }
    start = time.perf_counter()
    run: Run = train(
        read_recipe("image_folder", [f"{name}={value}" for name, value in settings.items()]),
        quiet=True,
    )
    images = 2 * options.images
    return {
        "data_wait": run.metrics()[-1]["data_wait"],
        "images_per_s": images / (time.perf_counter() - start),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--workers", default="0,1,2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "images"
        write_images(root, options.images)
        found = {"decoded_per_s_and_core": decoding(root)}
        print(f"one core decodes {found['decoded_per_s_and_core']:.0f} images/s")
        for number in options.workers.split(","):
            row = measure(root, Path(temporary) / number, int(number), options)
            found[f"workers {number}"] = row
            wait, speed = row["data_wait"], row["images_per_s"]
            print(f"workers {number}: waits {wait:.1%}, {speed:.2f} images/s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(hardware(device))
    write_result(f"input_{options.model}", device, options.batch, {"rows": found})


if __name__ == "__main__":
    main()
