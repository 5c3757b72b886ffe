"""Models that were trained for all degrees of the dial at once, on scenes and the small model.

    python -m benchmarks evidence_all_degrees --jobs 2

Two tasks, two dials and three seeds of `evidence_tocom`, whose fine-tuned models are three of the
columns: one that was trained at the degree it runs at, one that was trained without reduction, and
this one with a compensator (ToCom). "random" and "sandwich" see as many scenes as they do; an
update of the sandwich runs four degrees, so "short sandwich" sees a quarter of the scenes, in about
the time of the others. Differences to the model that was trained at the degree are paired: by test
scene, and by seed; intervals are those of the bootstrap over both.

Needs Debian's package dataset-fashion-mnist. Runs are written to --out, which may be that of
`evidence_tocom`; the same command continues an interrupted one. Results go to
benchmarks/results/evidence_all_degrees_HARDWARE_DATE.json.
"""

import argparse
import functools
import itertools
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence_real.common import cached
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from benchmarks.evidence_tocom import (
    DIALS,
    SEEDS,
    TEST,
    FineTunedModel,
    Question,
    batches,
    degrees,
    fine_tuned_model,
    scenes_parser,
    train_compensator,
)
from benchmarks.report import write_json
from tokendial.measure import Resampling

WANTED = ("count", "which")
"""Tasks. "where" is hardly learnt by these short trainings."""
ALL_DEGREES: dict[str, dict[str, Any]] = {
    "random": {"train.degrees": {"random": True}},
    "sandwich": {"train.degrees": {"sandwich": 2}},
    "short sandwich": {"train.degrees": {"sandwich": 2}, "data.train_size": 0.25},
}
"""Settings of the trainings for all degrees. A size below 1 is a share."""
KINDS = ("trained there", "trained at 0", "ToCom", *ALL_DEGREES)


@dataclass(frozen=True)
class AllDegrees(FineTunedModel):
    """A model that was fine-tuned for all degrees up to `source` at once."""

    kind: str = "random"
    """One of `ALL_DEGREES`."""

    def folder(self, out: Path) -> Path:
        """The folder of its run."""
        folder = super().folder(out)
        return folder.with_name(f"{folder.name}-{self.kind.replace(' ', '_')}")

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """Settings of its training."""
        settings = super().settings(options) | ALL_DEGREES[self.kind]
        if (size := settings["data.train_size"]) < 1:
            settings["data.train_size"] = round(size * options.scenes)
        return settings


def of_kind(kind: str, task: str, seed: int, dial: str, degree: int) -> FineTunedModel:
    """The model of a kind that runs at a degree."""
    if kind in ALL_DEGREES:
        return AllDegrees(task, seed, dial, degrees(dial)[-1], kind)
    return fine_tuned_model(task, seed, dial, degree if kind == "trained there" else 0)


@torch.no_grad()
def right_answers(kind: str, task: str, seed: int, dial: str, degree: int, out: Path) -> list[bool]:
    """Whether each test scene is answered right."""
    fine_tuned = of_kind(kind, task, seed, dial, degree)
    compensates = kind == "ToCom" and degree > 0
    words = [fine_tuned.folder(out).name, dial, str(degree), *["ToCom"] * compensates]
    path = out / "right" / f"{'-'.join(words)}.json"

    def compute() -> dict[str, list[bool]]:
        model, _ = Question(fine_tuned, dial, degree, "ToCom" if compensates else None).load(out)
        model.eval()
        test = batches(fine_tuned.folder(out), seed, TEST)
        answers = [model(images).argmax(1) == labels for images, labels in test]
        return {"right": torch.cat(answers).tolist()}

    found: list[bool] = cached(path, compute)["right"]
    return found


def row(task: str, dial: str, degree: int, out: Path) -> dict[str, Any]:
    """Accuracy of all kinds at a degree, and their differences to the first kind."""
    right = {
        kind: [
            np.array(right_answers(kind, task, seed, dial, degree, out), float) for seed in SEEDS
        ]
        for kind in KINDS
    }
    draws = Resampling(TEST, len(SEEDS))
    labels = np.zeros(TEST)
    scores = {kind: resampled_scores(draws, mean, each, labels) for kind, each in right.items()}
    matched = scores[KINDS[0]]
    return {
        "task": task,
        "dial": dial,
        "degree": degree,
        "accuracy": {kind: interval(each).value for kind, each in scores.items()},
        "minus trained there": {
            kind: interval(each - matched).percent(sign=True)
            for kind, each in scores.items()
            if kind != KINDS[0]
        },
    }


def main(arguments: list[str]) -> None:
    """Train, predict, print the table, and write the result."""
    options = scenes_parser("evidence_all_degrees", __doc__).parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    asked = [
        (kind, task, seed, dial, degree)
        for kind, task, seed, dial in itertools.product(KINDS, WANTED, SEEDS, DIALS)
        for degree in degrees(dial)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(train_compensator, dial, "ToCom", {}, options) for dial in DIALS]
        models = dict.fromkeys(of_kind(*question) for question in asked)
        runs += [pool.submit(model.train, options) for model in models]
        for run in runs:
            run.result()
    with ProcessPoolExecutor(options.jobs) as processes:
        answer = functools.partial(right_answers, out=options.out)
        list(processes.map(answer, *zip(*asked, strict=True)))
    rows = [
        row(task, dial, degree, options.out)
        for task, dial in itertools.product(WANTED, DIALS)
        for degree in degrees(dial)
    ]
    header = (
        "task",
        "dial",
        "degree",
        *KINDS,
        *(f"{kind} minus trained there" for kind in KINDS[1:]),
    )
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for each in rows:
        cells = [each["task"], each["dial"], str(each["degree"])]
        cells += [f"{100 * value:.1f}" for value in each["accuracy"].values()]
        print(f"| {' | '.join([*cells, *each['minus trained there'].values()])} |")
    write_json("evidence_all_degrees", {"batch": 50, "rows": rows, "scenes": options.scenes})
