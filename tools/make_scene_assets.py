"""Make the images that are shipped: items and backgrounds of the scenes.

Needs Debian's package dataset-fashion-mnist and a wheel of scikit-image:

    pip install scikit-image
    python tools/make_scene_assets.py src/tokendial/assets

Items are drawn from Fashion-MNIST's *test* file, so that they differ from the 60,000 training items
that the shipped backbone saw.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
BACKGROUNDS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
)
PER_CLASS = {"train": 200, "val": 100}
COLUMNS = 50


def read_idx(name: str) -> np.ndarray:
    """Array of an IDX file of unsigned bytes."""
    data = gzip.decompress((SOURCE / name).read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def write_items(folder: Path) -> None:
    """One sprite sheet and one list of labels per split."""
    items, labels = read_idx("t10k-images-idx3-ubyte.gz"), read_idx("t10k-labels-idx1-ubyte.gz")
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    first = 0
    for split, count in PER_CLASS.items():
        chosen = rng.permutation(np.concatenate([c[first : first + count] for c in by_class]))
        first += count
        sheet = items[chosen].reshape(-1, COLUMNS, 28, 28).swapaxes(1, 2).reshape(-1, COLUMNS * 28)
        Image.fromarray(sheet).save(folder / f"items_{split}.png", optimize=True)
        (folder / f"items_{split}.json").write_text(json.dumps(labels[chosen].tolist()) + "\n")


def write_backgrounds(folder: Path) -> None:
    """Photographs, shrunk to 160 pixels on the short side."""
    folder.mkdir(exist_ok=True)
    for name in BACKGROUNDS:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        factor = 160 / min(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        image = image.resize(size, Image.Resampling.LANCZOS)
        image.save(folder / f"{Path(name).stem}.jpg", quality=88)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_items(target)
    write_backgrounds(target / "backgrounds")
