"""Table: models that run at another degree of the dial than they were trained at."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.evidence_real.classifiers import (
    DIALS,
    Classifier,
    Setting,
    bootstrap,
    compute,
)
from benchmarks.evidence_real.common import SEEDS, Options
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import (
    Metric,
    auroc,
    balanced_accuracy,
    interval,
)

DATA = ("elpv", "stamps")
METHODS = ("adaptformer", "dense_adapter")
METRICS: dict[str, Metric] = {"balanced accuracy": balanced_accuracy, "AUROC": auroc}
HEADER = ("data", "adapter", "dial", "trained at", "run at", *METRICS, "minus matched")


def degrees(dial: str) -> tuple[int, int, int]:
    """The degrees of the table: none, half and all of the dial."""
    return 0, DIALS[dial].r // 2, DIALS[dial].r


def classifier(data: str, method: str, dial: str, degree: int, seed: int) -> Classifier:
    """The classifier that was trained at a degree. At degree 0 it is the same for all dials."""
    return Classifier(data, method, seed, dial if degree else None, degree)


def trainings(data: Iterable[str] = DATA, methods: Iterable[str] = METHODS) -> list[Classifier]:
    """All classifiers of the table, those of the first seed first."""
    return list(
        dict.fromkeys(
            classifier(name, method, dial, degree, seed)
            for seed, name, method in itertools.product(SEEDS, data, methods)
            for dial in DIALS
            for degree in degrees(dial)
        )
    )


def main(options: Options) -> None:
    """Train, predict, and write the table."""
    questions = [
        (one, Setting(dial, degree))
        for one in trainings()
        for dial in DIALS
        if one.dial in (None, dial)
        for degree in degrees(dial)
    ]
    compute(questions, options)
    rows = [row for data in DATA for row in table(data, options)]
    write_table("mismatch", HEADER, [row["cells"] for row in rows], {"rows": rows})


def table(data: str, options: Options) -> list[dict[str, Any]]:
    """The rows of a data set: scores, and their difference to models trained at that degree."""
    rows = []
    for method, dial in itertools.product(METHODS, DIALS):
        for target in degrees(dial):
            matched = replicates(data, method, dial, target, target, options)
            for source in degrees(dial):
                found = replicates(data, method, dial, source, target, options)
                scores = {name: interval(values) for name, values in found.items()}
                difference = interval(found["balanced accuracy"] - matched["balanced accuracy"])
                cells = (data, method, dial, str(source), str(target))
                cells += tuple(score.percent() for score in scores.values())
                cells += ("-" if source == target else difference.percent(sign=True),)
                rows.append({"cells": cells, "difference": difference.value})
    return rows


def replicates(
    data: str, method: str, dial: str, source: int, target: int, options: Options
) -> dict[str, np.ndarray]:
    """Bootstrap replicates of each metric: trained at `source`, run at `target`."""
    asked = [
        (classifier(data, method, dial, source, seed), Setting(dial, target)) for seed in SEEDS
    ]
    return {name: bootstrap(asked, metric, options) for name, metric in METRICS.items()}
