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


def best_rate(data: str, method: str, options: Options) -> float:
    """The rate with the best score; of equal ones the smallest."""
    return RATES[int(np.argmax(held_out_scores(data, method, options)))]


def rows_of(data: str, options: Options) -> list[dict[str, Any]]:
    """One row for each method."""
    found = {}
    for method in METHODS:
        at_best = finals(data, method, best_rate(data, method, options))
        asked = [(one, Setting()) for one in at_best]
        found[method] = bootstrap(asked, balanced_accuracy, options)
    return [
        {
            "data": data,
            "method": method,
            "held out": held_out_scores(data, method, options),
            "rate": best_rate(data, method, options),
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
    """Train, predict, and write the table."""
    both = list(itertools.product(DATA, METHODS))
    compute(
        [(candidate(*each, lr), Setting()) for each in both for lr in RATES], options, part="val"
    )
    compute(
        [(one, Setting()) for each in both for one in finals(*each, best_rate(*each, options))],
        options,
    )
    rows = [row for data in DATA for row in rows_of(data, options)]
    write_table("best_rates", HEADER, map(cells, rows), {"rows": plain(rows)})
