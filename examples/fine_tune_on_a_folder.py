"""Fine-tune on a folder of images, evaluate along the dial, and predict.

This program does in Python what `tokendial train`, `tokendial eval` and `tokendial predict` do on
the command line. Images lie in FOLDER/train/CLASS/ and FOLDER/val/CLASS/. Without --data, it writes
a small folder first: pictures of single items of clothing.

It prints the accuracy of each epoch, then accuracy, cost and speed at some degrees, then the class
of one image.
"""

import argparse
from pathlib import Path

import yaml

from tokendial.data import Scenes
from tokendial.runs import read_recipe
from tokendial.runs.evaluate import evaluate
from tokendial.runs.predict import Prediction, predict
from tokendial.train import train

RECIPE = {
    "model": {"name": "scenes_vit", "weights": "shipped"},  # elsewhere a name of a timm model
    "reduce": {"name": "evit", "keep_rate": 0.7, "layers": [4, 7, 10]},
    "adapt": {"name": "dense_adapter", "dim": 16},
    "data": {"name": "image_folder"},
    "augment": {"crop": False, "test_crop_ratio": 1.0},
    "train": {"epochs": 3, "batch_size": 20, "lr": 0.01, "trackers": []},
}


def write_images(folder: Path, *, train_size: int = 160, val_size: int = 40) -> None:
    """Write an image folder: one item on each picture, a folder for each of the ten kinds."""
    splits = Scenes(task="which", cells=1, train_size=train_size, val_size=val_size).build(seed=0)
    for name, size in (("train", train_size), ("val", val_size)):
        for index in range(size):
            image, kind = getattr(splits, name)[index]
            path = folder / name / splits.classes[kind] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def main() -> None:
    """Train, evaluate, predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--out", type=Path, default=Path("example_run"), help="folder of the run")
    arguments = parser.parse_args()

    data = arguments.data or arguments.out / "images"
    if arguments.data is None:
        write_images(data)
    recipe_file = arguments.out / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(RECIPE))
    recipe = read_recipe(recipe_file, [f"data.root={data}", f"output={arguments.out / 'run'}"])

    run = train(recipe, quiet=True)
    for record in run.metrics():
        print(f"epoch {record['epoch']}: accuracy {record['val_accuracy']:.1%}")
    for row in evaluate(run, "0,3,6", batch_size=20):
        mmacs = 1000 * row.gmacs
        print(f"degree {row.degree}: {row.accuracy:.1%}, {mmacs:.0f} MMACs, {row.speedup:.2f}x")
    image = next(iter(sorted((data / "val").rglob("*.png"))))
    for answer in predict(run, [image], degree=6):
        if isinstance(answer, Prediction):  # else it says why the file cannot be read
            name, probability = answer.classes[0], answer.probabilities[0]
            print(f"{image.parent.name} was taken for {name} ({probability:.0%})")


if __name__ == "__main__":
    main()
