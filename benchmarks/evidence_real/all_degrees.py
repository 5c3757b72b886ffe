"""Table: models that were trained for all degrees of the dial at once.

Beside them stand the classifiers of table `mismatch`: one that was trained at the degree it runs
at, and one that was trained without reduction. "random" and "sandwich" see as many images. An
update of the sandwich runs four degrees, so "short_sandwich" has a quarter of its epochs and takes
the time of the others.
"""

import itertools
from typing import Any

from benchmarks.evidence_real.classifiers import (
    ALL_DEGREES,
    DIALS,
    Classifier,
    Setting,
    bootstrap,
    compute,
)
from benchmarks.evidence_real.common import THREE_SEEDS, Options
from benchmarks.evidence_real.mismatch import DATA, classifier, degrees
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval

METHOD = "adaptformer"
KINDS = ("trained there", "trained at 0", *ALL_DEGREES)
HEADER = ("data", "dial", "run at", *KINDS, *(f"{kind} minus trained there" for kind in KINDS[1:]))


def of_kind(kind: str, data: str, dial: str, degree: int, seed: int) -> Classifier:
    """The classifier of a kind that is run at a degree."""
    if kind in ALL_DEGREES:
        return Classifier(data, METHOD, seed, dial, DIALS[dial].r, all_degrees=kind)
    return classifier(data, METHOD, dial, degree if kind == "trained there" else 0, seed)


def questions() -> list[tuple[Classifier, Setting]]:
    """All classifiers of the table with the degrees that they run at; those of a seed together."""
    return [
        (of_kind(kind, data, dial, degree, seed), Setting(dial, degree))
        for seed, data, dial, kind in itertools.product(THREE_SEEDS, DATA, DIALS, KINDS)
        for degree in degrees(dial)
    ]


def main(options: Options) -> None:
    """Train, predict, and write the table."""
    compute(questions(), options)
    rows = [
        row(data, dial, degree, options)
        for data, dial in itertools.product(DATA, DIALS)
        for degree in degrees(dial)
    ]
    write_table("all_degrees", HEADER, [each["cells"] for each in rows], {"rows": rows})


def row(data: str, dial: str, degree: int, options: Options) -> dict[str, Any]:
    """Balanced accuracy of all kinds at a degree, and their differences to the first kind."""
    found = {}
    for kind in KINDS:
        asked = [
            (of_kind(kind, data, dial, degree, seed), Setting(dial, degree)) for seed in THREE_SEEDS
        ]
        found[kind] = bootstrap(asked, balanced_accuracy, options)
    matched = found[KINDS[0]]
    scores = [interval(values) for values in found.values()]
    differences = [interval(found[kind] - matched) for kind in KINDS[1:]]
    cells = [data, dial, str(degree), *(f"{100 * score.value:.1f}" for score in scores)]
    cells += [difference.percent(sign=True) for difference in differences]
    return {"cells": cells, "differences": [difference.value for difference in differences]}
