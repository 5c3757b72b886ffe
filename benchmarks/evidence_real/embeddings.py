"""Table: embeddings of the frozen model under ToMe: plain, compensated, and with a trained adapter.

Compensator and adapter were trained on the same unlabelled pictures for as many epochs, the adapter
by the recipe real/embeddings with three seeds. Embeddings are those of table `zero_training`, and
so are its measures, over images of its test sets: answers of the nearest stored images, whose
embeddings are those of the frozen model with all tokens, as in an index that was made before.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tokendial as td
from benchmarks.evidence_real.common import (
    THREE_SEEDS,
    Options,
    cached,
    frozen_backbone,
    in_processes,
    in_threads,
    train,
)
from benchmarks.evidence_real.matched_costs import Reduction
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from benchmarks.evidence_real.tocom import train_compensator
from benchmarks.evidence_real.zero_training import (
    IMG_SIZE,
    embed_parts,
    features,
    per_image,
    predictions,
    resampling,
)
from tokendial.measure import Interval
from tokendial.model.dial_vit import DialViT

DATA = ("elpv", "stamps", "fashion")
DEGREES = (3, 6)
"""Of the dial of the recipe, ToMe up to r = 6 at 64 patches."""
LOSS = "features"
"""What the compensator learns from."""
METHODS = ("plain", "ToCom", "adapter")
MEASURES = ("cosine", "same answer", "right answer")
HEADER = ("data", "method", "r", "cost", *MEASURES, "right answer, minus degree 0")


def train_adapter(seed: int, options: Options) -> Path:
    """Train the adapter of a seed. Returns the folder of its model."""
    settings: dict[str, Any] = {
        "seed": seed,
        "model.weights": str(options.weights.resolve()),
        "data.root": str(options.pictures.resolve()),
    }
    return train(f"embeddings-{seed}", "real/embeddings", settings, options) / "last"


def seeds(method: str) -> Sequence[int]:
    """Seeds of a method's trainings; without training there is one model."""
    return THREE_SEEDS if method == "adapter" else THREE_SEEDS[:1]


def open_model(method: str, seed: int, options: Options) -> DialViT:
    """The model of a method, at degree 0."""
    if method == "adapter":
        model = td.load(train_adapter(seed, options))
        model.set_degree(0)
        return model
    model = td.wrap(frozen_backbone(IMG_SIZE, options), reduce=td.ToMe(r=DEGREES[-1])).eval()
    model.set_degree(0)
    if method == "ToCom":
        folder = train_compensator("tome", LOSS, options)
        td.Compensator.from_pretrained(folder).attach(model, source=0)
    return model


def embeddings(
    data: str, method: str, seed: int, degree: int, options: Options
) -> dict[str, np.ndarray]:
    """Embeddings of training and test images, and the share of the cost, computed once."""

    def compute() -> dict[str, np.ndarray]:
        model = open_model(method, seed, options)
        model.set_degree(degree)
        share = model.cost().macs / model.cost(0).macs
        return {"share": np.array(share), **embed_parts(model, data, options)}

    name = f"{method}-{seed}-{degree}.npz"
    return cached(options.out / "embeddings" / data / name, compute)


def rows_of(data: str, options: Options) -> list[dict[str, Any]]:
    """The rows of a data set: plain, compensated and adapted, at each degree."""
    stored = features(data, Reduction(), options)
    before = predictions(stored, stored)
    right_before = per_image(stored, stored)["stored"]

    def measured(values: list[np.ndarray]) -> Interval:
        draws = resampling(data, options, len(values))
        return interval(resampled_scores(draws, mean, values, np.zeros(len(before))))

    rows = []
    for method, degree in itertools.product(METHODS, DEGREES):
        found = [embeddings(data, method, seed, degree, options) for seed in seeds(method)]
        compared = [per_image(each, stored) for each in found]
        answers = [predictions(stored, each) for each in found]
        row: dict[str, Any] = {"data": data, "method": method, "r": degree}
        row["cost"] = float(found[0]["share"])
        row["cosine"] = measured([each["cosine"] for each in compared])
        row["same answer"] = measured([(a == before).astype(float) for a in answers])
        row["right answer"] = measured([each["stored"] for each in compared])
        row[HEADER[-1]] = measured([each["stored"] - right_before for each in compared])
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row as text."""
    cosine = row["cosine"]
    return (
        *(row["data"], row["method"], str(row["r"]), f"{row['cost']:.0%}"),
        f"{cosine.value:.4f} ({cosine.low:.4f}, {cosine.high:.4f})",
        row["same answer"].percent(),
        row["right answer"].percent(),
        row[HEADER[-1]].percent(sign=True),
    )


def compute(data: str, options: Options) -> None:
    """Compute all embeddings of a data set."""
    features(data, Reduction(), options)
    for method, degree in itertools.product(METHODS, DEGREES):
        for seed in seeds(method):
            embeddings(data, method, seed, degree, options)


def main(options: Options) -> None:
    """Train, embed, and write the table."""
    jobs = [functools.partial(train_compensator, "tome", LOSS, options)]
    jobs += [functools.partial(train_adapter, seed, options) for seed in THREE_SEEDS]
    in_threads(lambda job: job(), jobs, options)
    in_processes(functools.partial(compute, options=options), DATA, options)
    rows = list(itertools.chain.from_iterable(rows_of(data, options) for data in DATA))
    write_table("embeddings", HEADER, map(cells, rows), {"rows": plain(rows)})
