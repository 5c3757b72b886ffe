"""Table: models that were trained for all degrees of the dial at once.

Beside them stand the classifiers of table `mismatch`: one that was trained at the degree it runs
at, and one that was trained without reduction; "ToCom" is the latter with the compensator of table
`tocom`. "random" and "sandwich" see as many images. An update of the sandwich runs four degrees, so
"short_sandwich" has a quarter of its epochs and takes the time of the others.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

from benchmarks.evidence_real.classifiers import (
    ALL_DEGREES,
    DIALS,
    Classifier,
    Setting,
    bootstrap,
    compute,
    predict,
)
from benchmarks.evidence_real.common import THREE_SEEDS, Options, in_processes, in_threads
from benchmarks.evidence_real.mismatch import DATA, classifier, degrees
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval
from benchmarks.evidence_real.tocom import best_scale, train_compensator

METHOD = "adaptformer"
TRAINED = ("trained there", "trained at 0", *ALL_DEGREES)
KINDS = (*TRAINED[:2], "ToCom", *TRAINED[2:])
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
        for seed, data, dial, kind in itertools.product(THREE_SEEDS, DATA, DIALS, TRAINED)
        for degree in degrees(dial)
    ]


def setting(
    kind: str,
    one: Classifier,
    dial: str,
    degree: int,
    compensators: dict[str, Path],
    options: Options,
) -> Setting:
    """How a classifier of a kind runs at a degree. Without reduction a compensator adds nothing."""
    if kind == "ToCom" and degree:
        return best_scale(one, dial, degree, compensators[dial], options)
    return Setting(dial, degree)


def main(options: Options) -> None:
    """Train, predict, and write the table."""
    folders = in_threads(lambda dial: train_compensator(dial, "features", options), DIALS, options)
    compensators = dict(zip(DIALS, folders, strict=True))
    compute(questions(), options)
    compensated = [
        (of_kind("ToCom", data, dial, 0, seed), dial, degree)
        for seed, data, dial in itertools.product(THREE_SEEDS, DATA, DIALS)
        for degree in degrees(dial)
    ]
    answer = functools.partial(_answer_compensated, compensators=compensators, options=options)
    in_processes(answer, compensated, options)
    rows = [
        row(data, dial, degree, compensators, options)
        for data, dial in itertools.product(DATA, DIALS)
        for degree in degrees(dial)
    ]
    write_table("all_degrees", HEADER, [each["cells"] for each in rows], {"rows": rows})


def _answer_compensated(
    question: tuple[Classifier, str, int], compensators: dict[str, Path], options: Options
) -> None:
    one, dial, degree = question
    predict(one, setting("ToCom", one, dial, degree, compensators, options), options)


def row(
    data: str, dial: str, degree: int, compensators: dict[str, Path], options: Options
) -> dict[str, Any]:
    """Balanced accuracy of all kinds at a degree, and their differences to the first kind."""
    found = {}
    for kind in KINDS:
        models = [of_kind(kind, data, dial, degree, seed) for seed in THREE_SEEDS]
        asked = [(one, setting(kind, one, dial, degree, compensators, options)) for one in models]
        found[kind] = bootstrap(asked, balanced_accuracy, options)
    matched = found[KINDS[0]]
    scores = [interval(values) for values in found.values()]
    differences = [interval(found[kind] - matched) for kind in KINDS[1:]]
    cells = [data, dial, str(degree), *(f"{100 * score.value:.1f}" for score in scores)]
    cells += [difference.percent(sign=True) for difference in differences]
    return {"cells": cells, "differences": [difference.value for difference in differences]}
