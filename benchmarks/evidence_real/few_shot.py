"""Table: models trained on a few images of each class, run at another degree, with a compensator.

AdaptFormer on 4 and on 16 images of each class, which each seed draws anew, at degree 0; about
2,000 images are seen in every training. The models run at the highest degree without and with the
compensator of the table `tocom`, at the scale it was trained at: who has few images has none to
search a scale on.
"""

import itertools
from typing import Any

from benchmarks.evidence_real.classifiers import DIALS, Classifier, Setting, bootstrap, compute
from benchmarks.evidence_real.common import THREE_SEEDS, Options, in_threads
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval
from benchmarks.evidence_real.tocom import METHOD, train_compensator

DATA = ("elpv", "stamps")
SHOTS = (4, 16)
LOSS = "features"
"""What the compensator was trained on."""
HEADER = ("data", "images per class", "dial", "at degree 0", "lost at 6", "won back")


def few(data: str, shots: int, seed: int) -> Classifier:
    """The classifier of a few images."""
    return Classifier(data, METHOD, seed, images_per_class=shots)


def settings_of(dial: str, options: Options) -> dict[str, Setting]:
    """How each classifier runs, by name."""
    degree = DIALS[dial].r
    compensator = options.out / "runs" / f"compensator-{dial}-{LOSS}" / "last"
    return {
        "whole": Setting(dial, 0),
        "plain": Setting(dial, degree),
        "compensated": Setting(dial, degree, str(compensator)),
    }


def row_of(data: str, shots: int, dial: str, options: Options) -> dict[str, Any]:
    """A row: balanced accuracy at degree 0, and paired differences to it."""
    models = [few(data, shots, seed) for seed in THREE_SEEDS]
    found = {
        name: bootstrap([(one, setting) for one in models], balanced_accuracy, options)
        for name, setting in settings_of(dial, options).items()
    }
    return {
        "data": data,
        "images per class": shots,
        "dial": dial,
        "whole": interval(found["whole"]),
        "lost": interval(found["whole"] - found["plain"]),
        "won back": interval(found["compensated"] - found["plain"]),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row as text."""
    differences = (row[name].percent(sign=True) for name in ("lost", "won back"))
    first = (row["data"], str(row["images per class"]), row["dial"])
    return *first, row["whole"].percent(), *differences


def main(options: Options) -> None:
    """Train, predict, and write the table."""
    in_threads(lambda dial: train_compensator(dial, LOSS, options), DIALS, options)
    compute(
        [
            (few(data, shots, seed), setting)
            for data, shots, seed in itertools.product(DATA, SHOTS, THREE_SEEDS)
            for dial in DIALS
            for setting in settings_of(dial, options).values()
        ],
        options,
    )
    rows = [row_of(*each, options) for each in itertools.product(DATA, SHOTS, DIALS)]
    write_table("few_shot", HEADER, map(cells, rows), {"rows": plain(rows)})
