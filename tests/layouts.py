"""Write data sets of a few small images in their published layouts."""

import json
import pickle
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy.io import savemat

from tokendial.data.sets.scene_items import load_items

BACKGROUNDS = Path(__file__).parent.parent / "src" / "tokendial" / "assets" / "backgrounds"
SIDE = 32
STAMP_FOLDERS = {
    "animals/birds": 7,
    "animals/fish": 5,
    "animals/insects": 2,
    "food": 3,
    "food/nuts": 3,
    "people": 3,
}
"""Objects by folder. Three folders become classes (food with those of food/nuts); of the others,
five objects are of no class."""
CIFAR_NAMES = [f"thing {number}" for number in range(100)]


def pieces_of_photographs() -> np.ndarray:
    """Return 48 different pieces [48, 32, 32, 3] uint8 of the shipped photographs."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [np.asarray(Image.open(BACKGROUNDS / f"{name}.jpg").convert("RGB")) for name in names]
    corners = [(SIDE * row, SIDE * column) for row in range(1, 4) for column in range(1, 5)]
    found = [photo[y : y + SIDE, x : x + SIDE] for photo in photos for y, x in corners]
    assert len({piece.tobytes() for piece in found}) == len(found) == 48
    return np.stack(found)


def write_images(root: Path, pieces: np.ndarray, names: Iterable[str]) -> Path:
    """Write the i-th piece under the i-th name below a folder; return the folder."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pieces[number % len(pieces)]).save(path)
    return root


def write_cifar100(
    root: Path, pieces: np.ndarray, train: Sequence[int], test: Sequence[int]
) -> Path:
    """Write CIFAR-100: the training file as pickled by Python 2, the others by Python 3."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    first, second = flat(pieces[: len(train)]), flat(pieces[len(train) :][: len(test)])
    (folder / "train").write_bytes(python2_pickle(first, list(train)))
    (folder / "test").write_bytes(pickled({"data": second, "fine_labels": list(test)}))
    (folder / "meta").write_bytes(pickled({"fine_label_names": CIFAR_NAMES}))
    return root


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Return a dictionary as Python 2 pickles it with protocol 2: its strings are bytes."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += text(b"b") + b"tR(" + number(1)
    array += b"(" + b"".join(map(number, pixels.shape)) + b"t"
    array += dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + listed + b"u."


def pickled(value: object) -> bytes:
    # Later protocols store arrays differently, and the set was never published in them.
    return pickle.dumps(value, protocol=4)


def flat(pieces: np.ndarray) -> np.ndarray:
    """Return pieces as [N, 3072]: first all of red, then all of green, then all of blue."""
    return np.ascontiguousarray(pieces.transpose(0, 3, 1, 2).reshape(len(pieces), -1))


def write_svhn(root: Path, split: str, pieces: np.ndarray, labels: Sequence[int]) -> Path:
    """Write SVHN as published: images along the last axis, the digit 0 stored as 10."""
    root.mkdir(parents=True, exist_ok=True)
    variables = {"X": pieces.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
    savemat(root / f"{split}_32x32.mat", variables, do_compression=True)
    return root


def write_food101(
    root: Path, pieces: np.ndarray, train: Sequence[str], test: Sequence[str]
) -> Path:
    """Write Food-101 with images such as baklava/12."""
    write_images(root, pieces, (f"images/{name}.jpg" for name in [*train, *test]))
    classes = sorted({name.split("/")[0] for name in train})
    (root / "meta").mkdir()
    for name, lines in (("classes", classes), ("train", train), ("test", test)):
        (root / "meta" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_elpv(root: Path, pieces: np.ndarray, lines: Sequence[str]) -> Path:
    """Write ELPV with lines such as "images/cell0001.png 1.0 mono"."""
    write_images(root, pieces, (line.split()[0] for line in lines))
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def write_vtab(root: Path, pieces: np.ndarray, task: str, lists: dict[str, list[str]]) -> Path:
    """Write a task of VTAB-1k with lists of lines such as "images/a.jpg 0"."""
    names = dict.fromkeys(line.rsplit(maxsplit=1)[0] for lines in lists.values() for line in lines)
    write_images(root / task, pieces, names)
    for name, lines in lists.items():
        (root / task / name).write_text("\n".join(lines) + "\n")
    return root


def write_fgvc(root: Path, pieces: np.ndarray, images: str, train: int, test: int) -> Path:
    """Write VPT's JSON lists of images in two classes; paths start in the folder `images`."""
    names = [f"{number % 2 + 1}/{number}.jpg" for number in range(train + test)]
    write_images(root / images, pieces, names)
    for split, part in (("train", names[:train]), ("test", names[train:])):
        listed = {name: int(name.split("/")[0]) for name in part}
        (root / f"{split}.json").write_text(json.dumps(listed))
    return root


def garments(kind: int) -> np.ndarray:
    """Shipped items of one of the ten kinds [N, 28, 28] uint8, bright on black."""
    items, kinds = load_items("shipped", "train")
    return items[kinds == kind]


def write_stamp(path: Path, item: np.ndarray) -> None:
    """Write an item as a PNG file with alpha, as a cut-out photograph is one."""
    grey = Image.fromarray(item).resize((112, 112), Image.Resampling.BICUBIC)
    # Widened, because what is thinner than a pixel when shrunk tints the ground without a mask.
    alpha = grey.filter(ImageFilter.MaxFilter(15)).point(lambda level: 255 if level > 40 else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Red and blue, as no shipped background is all over.
    Image.merge("RGBA", (grey, Image.new("L", grey.size), grey, alpha)).save(path)


def write_stamps(root: Path) -> Path:
    """Write stamps into `STAMP_FOLDERS`, and a drawing that is left out; return the folder."""
    for kind, (name, count) in enumerate(STAMP_FOLDERS.items()):
        for number, item in enumerate(garments(kind)[:count]):
            write_stamp(root / name / f"{number}.png", item)
    write_stamp(root / "animals" / "cartoon" / "drawn.png", garments(9)[0])
    return root
