"""Table: reduction methods on the frozen model, without training, judged by nearest neighbours.

Every method runs at about 90, 80, 70 and 60 % of the cost of the unreduced model, and so does the
unreduced model on smaller images, which is what anyone can do without a method. The class of a
test image is voted by the training images with the most similar class token. Their features come
from the same degree ("same degree"), or from degree 0, as if they had been stored before the dial
was turned ("stored"). The table shows differences of accuracy to degree 0, which are paired: both
models see the same images. Features are computed in bfloat16; "precision" in the JSON file tells
what float32 would change.
"""

import functools
import gzip
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

import tokendial as td
from benchmarks.evidence_real.common import Options, cached, frozen_backbone, in_processes
from benchmarks.evidence_real.matched_costs import (
    COSTS,
    FAMILIES,
    Reduction,
    nearest,
    reduce_config,
    reductions,
)
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from tokendial.data.transforms.image import ResizeImage
from tokendial.measure import Interval, Resampling
from tokendial.measure.neighbours import predict_classes
from tokendial.methods import to_json
from tokendial.model.dial_vit import DialViT
from tokendial.reduce import ReducerConfig
from tokendial.runs.recipe import check_method

IMG_SIZE = 112
SMALLER = "smaller images"
"""The family that reduces nothing and sees smaller images."""
SIDES = (98, 84, 70)
"""Their sides in pixels: 7, 6 and 5 patches instead of 8."""
_OFF = 0.03
"""Difference to the wanted cost from which a cell names its own."""
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""
FASHION_SIZES = {"train": 400, "t10k": 200}
"""Images of each of the ten classes."""
STAMPS = {"name": "stamps", "task": "category", "train_size": 2000, "val_size": 1000,
          "img_size": 128}  # fmt: skip
DATA = ("elpv", "stamps", "fashion")
PRECISION_CHECK = (Reduction(), Reduction("ToMe", 0.6), Reduction("EViT in 3 layers, drop", 0.6))
"""Reductions that also run in float32, on ELPV, to see whether bfloat16 decides anything."""
MEASURES = ("same degree", "stored", "agreement", "cosine")
HEADER = ("data", "method", *(f"{100 * cost:.0f} % of the cost" for cost in COSTS),
          "stored, 60 %", "agreement, 60 %", "cosine, 60 %")  # fmt: skip


def pixels(source: Dataset[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, side, side] uint8, and their classes [N]."""
    resize = ResizeImage((IMG_SIZE, IMG_SIZE))
    pairs = (source[index] for index in range(len(source)))
    images, labels = zip(*((resize(image), int(label)) for image, label in pairs), strict=True)
    return torch.stack([tvf.pil_to_tensor(image) for image in images]), torch.tensor(labels)


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """The first images of each class of Fashion-MNIST, as `pixels` returns them."""
    grey = _read_idx(f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    labels = _read_idx(f"{part}-labels-idx1-ubyte.gz", header=8)
    first = [np.flatnonzero(labels == number)[: FASHION_SIZES[part]] for number in range(10)]
    pairs = [(Image.fromarray(grey[i]).convert("RGB"), labels[i]) for i in np.concatenate(first)]
    return pixels(pairs)


def _read_idx(name: str, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)


@functools.lru_cache(maxsize=1)
def load_data(data: str, options: Options) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and classes of the parts "train" and "test"."""
    if data == "fashion":
        return {"train": fashion("train"), "test": fashion("t10k")}
    settings: dict[str, Any] = {"name": "elpv", "task": "defect"}
    if data == "elpv" and options.elpv:
        settings["root"] = str(Path(options.elpv).resolve())
    splits = check_method("data", STAMPS if data == "stamps" else settings).build(0)
    return {"train": pixels(splits.train), "test": pixels(splits.val)}


def resampling(data: str, options: Options, seeds: int = 1) -> Resampling:
    """Draws of test images and seeds; of stamps all pictures of an object are drawn together."""
    size = len(features(data, Reduction(), options)["test labels"])
    if data != "stamps":
        return Resampling(size, seeds)
    pictures = check_method("data", STAMPS).build(0).val.pictures
    path = options.out / "zero_training" / data / "objects.json"
    objects = cached(path, lambda: {"names": [pictures.compose(i).name for i in range(size)]})
    return Resampling(size, seeds, groups=objects["names"])


@functools.lru_cache(maxsize=4)
def backbone(side: int, options: Options) -> torch.nn.Module:
    """The frozen model for images of a side, which is built once in a process."""
    return frozen_backbone(side, options)


def all_reductions() -> list[Reduction]:
    """No reduction, smaller images, and each method, at each of `COSTS`."""
    return reductions([SMALLER, *FAMILIES])


def side_and_config(
    reduction: Reduction, options: Options
) -> tuple[int, ReducerConfig | None, float]:
    """Side of the images, the reduction's setting, and its cost as a share of that at degree 0."""
    if reduction.family != SMALLER:
        return IMG_SIZE, *reduce_config(reduction, backbone(IMG_SIZE, options))
    macs = [_macs(side, options) for side in (IMG_SIZE, *SIDES)]
    best = nearest(lambda position: macs[1 + position] / macs[0], len(SIDES), reduction.wanted)
    return SIDES[best], None, macs[1 + best] / macs[0]


def _macs(side: int, options: Options) -> int:
    model = td.wrap(backbone(side, options))
    macs = model.cost().macs
    model.release_backbone()
    return macs


def compute_features(
    data: str,
    side: int,
    config: ReducerConfig | None,
    options: Options,
    *,
    precision: str = "bf16",
) -> dict[str, np.ndarray]:
    """Class tokens after the final norm of training and test images, shown at a side in pixels."""
    model = td.wrap(backbone(side, options), reduce=config).eval()
    return embed_parts(model, data, options, side=side, precision=precision)


@torch.inference_mode()
def embed_parts(
    model: DialViT, data: str, options: Options, *, side: int = IMG_SIZE, precision: str = "bf16"
) -> dict[str, np.ndarray]:
    """Embeddings and labels of training and test images by a model, at its present degree."""
    model.skip_unread_patches = True
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    found: dict[str, np.ndarray] = {}
    for part, (images, labels) in load_data(data, options).items():
        features = []
        for batch in images.split(64):
            if side != IMG_SIZE:
                batch = tvf.resize(batch, [side, side], antialias=True)
            batch = tvf.normalize(batch / 255, *model.anatomy.statistics)
            with autocast:
                features.append(model(batch).float())
        found[part], found[f"{part} labels"] = torch.cat(features).numpy(), labels.numpy()
    return found


def features(
    data: str, reduction: Reduction, options: Options, *, precision: str = "bf16"
) -> dict[str, np.ndarray]:
    """Features of a reduction and its "share" of the cost, from a file if computed before."""
    path = options.out / "zero_training" / data / f"{reduction.name}-{precision}.npz"

    def compute() -> dict[str, np.ndarray]:
        side, config, share = side_and_config(reduction, options)
        found = compute_features(data, side, config, options, precision=precision)
        return {"share": np.array(share), **found}

    return cached(path, compute)


def compute(data: str, options: Options) -> None:
    """Compute all features of a data set."""
    for reduction in all_reductions():
        features(data, reduction, options)
    if data == "elpv":
        for reduction in PRECISION_CHECK:
            features(data, reduction, options, precision="fp32")


def predictions(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> np.ndarray:
    """Classes of test images, by the neighbours among training images."""
    known, labels, asked = (
        torch.from_numpy(a) for a in (train["train"], train["train labels"], test["test"])
    )
    return predict_classes(known, labels, asked).numpy()


def per_image(found: dict[str, np.ndarray], full: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of `MEASURES` for each test image.

    Args:
        found: Features at a degree.
        full: Features at degree 0.
    """
    labels = found["test labels"]
    same, stored = predictions(found, found), predictions(full, found)
    answers = predictions(full, full)
    lengths = np.linalg.norm(found["test"], axis=1) * np.linalg.norm(full["test"], axis=1)
    values = (
        same == labels,
        stored == labels,
        same == answers,
        (found["test"] * full["test"]).sum(1) / lengths,
    )
    return {n: v.astype(np.float64) for n, v in zip(MEASURES, values, strict=True)}


def rows_of(data: str, options: Options) -> list[dict[str, Any]]:
    """The rows of a data set."""
    full = features(data, Reduction(), options)
    draws = resampling(data, options)
    unreduced = per_image(full, full)
    rows = []
    for reduction in all_reductions():
        found = features(data, reduction, options)
        values = per_image(found, full)
        row: dict[str, Any] = {"data": data, "method": reduction.family, "wanted": reduction.wanted}
        row["cost"] = float(found["share"])
        for name in MEASURES:
            row[name] = _interval(draws, values[name])
        for name in ("same degree", "stored"):
            row[f"{name}, minus degree 0"] = _interval(draws, values[name] - unreduced[name])
        row["img_size"], config, _ = side_and_config(reduction, options)
        row["reduce"] = to_json("reduce", config) if config else None
        rows.append(row)
    return rows


def _interval(draws: Resampling, values: np.ndarray) -> Interval:
    return interval(resampled_scores(draws, mean, [values], np.zeros(len(values))))


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The accuracy at degree 0, and for each method its differences to it along the dial.

    Args:
        rows: The rows of one data set, those of a method in falling order of their cost.
    """
    accuracy = f"accuracy at degree 0: {rows[0]['same degree'].percent()}"
    lines = [(rows[0]["data"], accuracy, *[""] * (len(HEADER) - 2))]
    for family, of_method in itertools.groupby(rows[1:], key=lambda row: row["method"]):
        along = list(of_method)
        differences = [
            row["same degree, minus degree 0"].percent(sign=True) + _own_cost(row) for row in along
        ]
        last = along[-1]
        stored = last["stored, minus degree 0"].percent(sign=True)
        agreement, cosine = last["agreement"].percent(), f"{last['cosine'].value:.3f}"
        lines.append((last["data"], family, *differences, stored, agreement, cosine))
    return lines


def _own_cost(row: dict[str, Any]) -> str:
    """The cost of a row where it is not near the one that its column names."""
    return f" at {row['cost']:.0%}" if abs(row["cost"] - row["wanted"]) > _OFF else ""


def precision_rows(options: Options) -> list[dict[str, Any]]:
    """For some reductions on ELPV: what changes from float32 to bfloat16."""
    rows = []
    whole = {p: features("elpv", Reduction(), options, precision=p) for p in ("bf16", "fp32")}
    for reduction in PRECISION_CHECK:
        found = {p: features("elpv", reduction, options, precision=p) for p in ("bf16", "fp32")}
        answers = {p: predictions(each, each) for p, each in found.items()}
        row: dict[str, Any] = {"method": reduction.family, "cost": float(found["bf16"]["share"])}
        row["same answers"] = float((answers["bf16"] == answers["fp32"]).mean())
        for precision, each in found.items():
            values = per_image(each, whole[precision])
            row |= {f"{name}, {precision}": float(values[name].mean()) for name in MEASURES}
        rows.append(row)
    return rows


def main(options: Options) -> None:
    """Compute the features, and write the table."""
    in_processes(functools.partial(compute, options=options), DATA, options)
    by_data = [rows_of(data, options) for data in DATA]
    rows = list(itertools.chain.from_iterable(by_data))
    lines = itertools.chain.from_iterable(map(cells, by_data))
    result = {"costs": COSTS, "rows": plain(rows), "precision": precision_rows(options)}
    write_table("zero_training", HEADER, lines, result)
