"""Table: the gap between two degrees on one data set, added to a model of another data set.

On one data set, a model was fine-tuned at degree 0 and one at degree 6. The difference of their
weights is added to the model that was fine-tuned at degree 0 on the other data set, which then runs
at degree 6. Beside it stand that model without the difference, and the one that was fine-tuned at
degree 6. The models of a seed began with the same random weights.
"""

import itertools
from typing import Any

import numpy as np
import torch

import tokendial as td
from benchmarks.evidence_real.classifiers import (
    DIALS,
    Classifier,
    Setting,
    compute,
    load_model,
    predict,
    resampling,
    run_model,
)
from benchmarks.evidence_real.common import SEEDS, Options, cached
from benchmarks.evidence_real.mismatch import METHODS, classifier
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval, resampled_scores

OTHER = {"elpv": "stamps", "stamps": "elpv"}
"""The data set that the difference comes from, for each one that it is used on."""
HEADER = ("data", "adapter", "dial", "at degree 0", "lost at 6", "won back", "matched - at 6")


def with_difference(
    one: Classifier, dial: str, gap: tuple[Classifier, Classifier], options: Options
) -> np.ndarray:
    """Test logits at the highest degree of a classifier to which a difference was added."""
    name = f"{dial}{DIALS[dial].r}-difference-{gap[0].data}-test.npz"
    path = options.out / "predictions" / one.name / name

    def find() -> dict[str, np.ndarray]:
        target, base, model = (
            load_model(options.out / "runs" / each.name, dial) for each in (*gap, one)
        )
        td.difference(target, base).add_to(model)
        model.eval().set_degree(DIALS[dial].r)
        return {"logits": run_model(model, options.out / "runs" / one.name)[0]}

    return cached(path, find)["logits"]


def row_of(data: str, method: str, dial: str, options: Options) -> dict[str, Any]:
    """A row: balanced accuracy of a data set, paired differences in points."""
    degree = DIALS[dial].r
    logits: dict[str, list[np.ndarray]] = {"whole": [], "plain": [], "added": [], "matched": []}
    labels = np.empty(0)
    for seed in SEEDS:
        source = classifier(data, method, dial, 0, seed)
        gap = tuple(classifier(OTHER[data], method, dial, d, seed) for d in (degree, 0))
        whole, labels = predict(source, Setting(dial, 0), options)
        logits["whole"].append(whole)
        logits["plain"].append(predict(source, Setting(dial, degree), options)[0])
        logits["added"].append(with_difference(source, dial, (gap[0], gap[1]), options))
        matched = classifier(data, method, dial, degree, seed)
        logits["matched"].append(predict(matched, Setting(dial, degree), options)[0])
    draws = resampling(data, len(labels), len(SEEDS), options)
    found = {
        name: resampled_scores(draws, balanced_accuracy, each, labels)
        for name, each in logits.items()
    }
    return {
        "data": data,
        "method": method,
        "dial": dial,
        "whole": interval(found["whole"]),
        "lost": interval(found["whole"] - found["plain"]),
        "won back": interval(found["added"] - found["plain"]),
        "matched": interval(found["matched"] - found["plain"]),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row as text."""
    differences = (row[name].percent(sign=True) for name in ("lost", "won back", "matched"))
    return row["data"], row["method"], row["dial"], row["whole"].percent(), *differences


@torch.inference_mode()
def main(options: Options) -> None:
    """Train what is not trained, predict, and write the table."""
    settings = list(itertools.product(OTHER, METHODS, DIALS))
    compute(
        [
            (classifier(data, method, dial, source, seed), Setting(dial, target))
            for (data, method, dial), seed in itertools.product(settings, SEEDS)
            for source, target in ((0, 0), (0, DIALS[dial].r), (DIALS[dial].r, DIALS[dial].r))
        ],
        options,
    )
    rows = [row_of(*setting, options) for setting in settings]
    write_table("difference", HEADER, map(cells, rows), {"rows": plain(rows)})
