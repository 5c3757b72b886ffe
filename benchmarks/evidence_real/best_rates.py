"""Table: Sparse-Tuning and five other methods, each at its best of three learning rates.

Rates are compared by balanced accuracy on images that are held out of the training set, after
`EPOCHS` epochs of one seed. With the best one a method is trained for all epochs of its recipe on
all training images, with three seeds, and judged on the test images.
"""

import itertools
from typing import Any

import numpy as np

from benchmarks.evidence_real.classifiers import Classifier, Setting, bootstrap, compute, predict
from benchmarks.evidence_real.common import THREE_SEEDS, Options
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval

DATA = ("elpv", "stamps")
METHODS = ("sparse_tuning", "adaptformer", "lora", "vpt", "ssf", "convpass")
"""The first one is compared with the others, on the same images and seeds."""
RATES = (3e-4, 1e-3, 3e-3)
HEADER = (
    *("data", "method", "held out at " + ", ".join(f"{rate:g}" for rate in RATES), "rate"),
    *("balanced accuracy", f"{METHODS[0]} minus it"),
)


def candidate(data: str, method: str, lr: float) -> Classifier:
    """The classifier that a rate is judged by."""
    return Classifier(data, method, THREE_SEEDS[0], lr=lr)


def finals(data: str, method: str, lr: float) -> list[Classifier]:
    """The classifiers of all seeds at the best rate."""
    return [Classifier(data, method, seed, lr=lr, by_recipe=True) for seed in THREE_SEEDS]


def held_out_scores(data: str, method: str, options: Options) -> list[float]:
    """Balanced accuracy at each rate, on images that are held out of the training set."""
    found = (predict(candidate(data, method, lr), Setting(), options, "val") for lr in RATES)
    return [balanced_accuracy(*each) for each in found]


def rows_of(data: str, options: Options) -> list[dict[str, Any]]:
    """Train all models of a data set, and judge them. One row for each method."""
    tried = [(candidate(data, method, lr), Setting()) for method in METHODS for lr in RATES]
    compute(tried, options, part="val")
    held_out = {method: held_out_scores(data, method, options) for method in METHODS}
    # Of equal scores argmax takes the first, so the smallest rate.
    rates = {method: RATES[int(np.argmax(held_out[method]))] for method in METHODS}
    at_best = {
        method: [(one, Setting()) for one in finals(data, method, rates[method])]
        for method in METHODS
    }
    compute(itertools.chain(*at_best.values()), options)
    found = {
        method: bootstrap(asked, balanced_accuracy, options) for method, asked in at_best.items()
    }
    return [
        {
            "data": data,
            "method": method,
            "held out": held_out[method],
            "rate": rates[method],
            "score": interval(found[method]),
            "difference": interval(found[METHODS[0]] - found[method]),
        }
        for method in METHODS
    ]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row as text."""
    held_out = ", ".join(f"{100 * score:.1f}" for score in row["held out"])
    difference = "-" if row["method"] == METHODS[0] else row["difference"].percent(sign=True)
    score = row["score"].percent()
    return row["data"], row["method"], held_out, f"{row['rate']:g}", score, difference


def main(options: Options) -> None:
    """Train, predict, and write the table after each data set: each takes an hour and more."""
    rows: list[dict[str, Any]] = []
    for data in DATA:
        rows += rows_of(data, options)
        write_table("best_rates", HEADER, map(cells, rows), {"rows": plain(rows)})
