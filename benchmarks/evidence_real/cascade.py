"""Table: a cascade beside fixed degrees that take the same time, and whether its bound holds.

A cascade runs each image at a cheap degree, and at degree 0 if it is unsure. Its threshold is
calibrated on one half of the test images and judged on the other, then the other way round. Times
are those of an image in a full batch: images that are sent on are collected until they fill one.
(In PyTorch, a single image of 64 patches is no faster at any degree.) "Broken" counts, among
`CALIBRATIONS` calibrations on images that are drawn from all test images with replacement, those
whose threshold changes more of all test images than promised; that may happen to 5 %.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokendial as td
from benchmarks.evidence_real.all_degrees import METHOD, of_kind
from benchmarks.evidence_real.classifiers import (
    DIALS,
    Classifier,
    Setting,
    compute,
    predict,
    resampling,
)
from benchmarks.evidence_real.common import (
    THREE_SEEDS,
    Options,
    cached,
    in_processes,
)
from benchmarks.evidence_real.mismatch import DATA, classifier, degrees
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import interval, resampled_scores
from tokendial.cascade import Observations, choose_thresholds
from tokendial.cascade.answers import answers, are_same, how_sure
from tokendial.measure import time_in_rounds
from tokendial.runs import Run
from tokendial.runs.cascade import scores_at_time

ALLOWED = 0.05
"""Share of the answers that may be others than those of degree 0."""
CALIBRATIONS = 200
BATCH = 32
"""Images in the batches that are timed."""
KINDS = ("trained at 0", "trained at it", "random", "sandwich")
HEADER = (
    *("data", "dial", "model", "cheap degree", "sent on", "changed", "time", "broken"),
    *("minus degree 0", "minus fixed degrees at this time", "minus sending on at random"),
)


@dataclass(frozen=True)
class Question:
    """One model with a cascade from a cheap degree to degree 0."""

    data: str
    """Data set."""
    dial: str
    """Key of `DIALS`."""
    kind: str
    """One of `KINDS`."""
    cheap: int
    """The cheap degree."""

    def classifier(self, seed: int) -> Classifier:
        """The model."""
        if self.kind == "trained at it":
            return classifier(self.data, METHOD, self.dial, self.cheap, seed)
        return of_kind(self.kind, self.data, self.dial, 0, seed)

    def logits(self, seed: int, options: Options) -> tuple[dict[int, Tensor], np.ndarray]:
        """Logits [N, classes] at each degree up to the cheap one, and labels [N]."""
        found = {
            degree: predict(self.classifier(seed), Setting(self.dial, degree), options)
            for degree in degrees(self.dial)
            if degree <= self.cheap
        }
        return {degree: torch.from_numpy(each) for degree, (each, _) in found.items()}, found[0][1]


def questions() -> list[Question]:
    """All rows of the table."""
    return [
        Question(data, dial, kind, cheap)
        for data, dial, kind in itertools.product(DATA, DIALS, KINDS)
        for cheap in degrees(dial)[1:]
    ]


def main(options: Options) -> None:
    """Train, predict, measure times, and write the table."""
    compute(
        (
            (question.classifier(seed), Setting(question.dial, degree))
            for seed in THREE_SEEDS
            for question in questions()
            for degree in degrees(question.dial)
        ),
        options,
    )
    seconds = {dial: image_seconds(dial, options) for dial in DIALS}
    rows = in_processes(
        functools.partial(row, seconds=seconds, options=options), questions(), options
    )
    write_table("cascade", HEADER, [each["cells"] for each in rows], {"rows": rows, "s": seconds})


def image_seconds(dial: str, options: Options) -> dict[int, float]:
    """Seconds of an image at each degree, in batches of `BATCH`, in bfloat16 on one thread."""
    path = options.out / "cascade" / f"seconds-{dial}.json"
    found = cached(path, lambda: _measured(dial, options))
    return {int(degree): seconds for degree, seconds in found.items()}


@torch.inference_mode()
def _measured(dial: str, options: Options) -> dict[str, float]:
    torch.set_num_threads(1)
    run = Run(options.out / "runs" / classifier(DATA[0], METHOD, dial, 0, THREE_SEEDS[0]).name)
    model = td.load(run.last, reduce=DIALS[dial]).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, *model.anatomy.image_size, generator=generator)

    def work(_: None) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(images)

    wanted = degrees(dial)
    timings = time_in_rounds(
        wanted, model.set_degree, work, device=torch.device("cpu"), seconds=5.0
    )
    seconds = [timing.seconds / BATCH for timing in timings]
    return {str(degree): each for degree, each in zip(wanted, seconds, strict=True)}


def row(
    question: Question, seconds: dict[str, dict[int, float]], options: Options
) -> dict[str, Any]:
    """One row: shares, time, and differences of balanced accuracy."""
    of_seeds = [_of_seed(question, seed, seconds[question.dial], options) for seed in THREE_SEEDS]
    labels = question.logits(THREE_SEEDS[0], options)[1]
    draws = resampling(question.data, len(labels), len(THREE_SEEDS), options)

    def replicates(name: str) -> np.ndarray:
        return resampled_scores(
            draws, balanced_share, [found["right"][name] for found in of_seeds], labels
        )

    cascade = replicates("cascade")
    differences = {
        name: interval(cascade - replicates(name)) for name in ("whole", "fixed", "random")
    }
    shares = {
        name: float(np.mean([found[name] for found in of_seeds]))
        for name in ("sent on", "changed", "time", "broken")
    }
    cells = [question.data, question.dial, question.kind, str(question.cheap)]
    cells += [f"{100 * share:.1f} %" for share in shares.values()]
    cells += [difference.percent(sign=True) for difference in differences.values()]
    return {"cells": cells, **shares} | {
        name: difference.value for name, difference in differences.items()
    }


def _of_seed(
    question: Question, seed: int, seconds: dict[int, float], options: Options
) -> dict[str, Any]:
    logits, labels = question.logits(seed, options)
    given = {degree: answers(each) for degree, each in logits.items()}
    correct = {
        degree: are_same(each, torch.from_numpy(labels)).double() for degree, each in given.items()
    }
    right = {degree: each.numpy() for degree, each in correct.items()}
    changed = ~are_same(given[question.cheap], given[0])
    all_images = Observations(how_sure(logits[question.cheap], "margin")[None], changed[None])
    stages = _stages_in_halves(all_images, seed)
    sent_on = float(stages.mean())
    time_s = seconds[question.cheap] + sent_on * seconds[0]
    return {
        "right": {
            "cascade": np.where(stages, right[0], right[question.cheap]),
            "whole": right[0],
            "fixed": scores_at_time(
                correct, {degree: seconds[degree] for degree in correct}, time_s
            ).numpy(),
            "random": sent_on * right[0] + (1 - sent_on) * right[question.cheap],
        },
        "sent on": sent_on,
        "changed": float((changed.numpy() & ~stages).mean()),
        "time": time_s / seconds[0],
        "broken": broken_promises(all_images, seed) / CALIBRATIONS,
    }


def _stages_in_halves(found: Observations, seed: int) -> np.ndarray:
    """Whether each image is sent on, by the threshold that the other half of them gives. [N]."""
    count = found.sure.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    stages = torch.zeros(count, dtype=torch.bool)
    first, second = order.tensor_split(2)
    for calibrating, judged in ((first, second), (second, first)):
        thresholds = choose_thresholds(found.of(calibrating), "changed", ALLOWED).thresholds
        stages[judged] = found.of(judged).stage_of(thresholds).bool()
    return stages.numpy()


def broken_promises(found: Observations, seed: int) -> int:
    """How many of `CALIBRATIONS` calibrations on drawn images change more than `ALLOWED` of all."""
    count, broken = found.sure.shape[1], 0
    generator = torch.Generator().manual_seed(seed)
    for number in range(CALIBRATIONS):
        drawn = torch.randint(count, (count,), generator=generator)
        thresholds = choose_thresholds(found.of(drawn), "changed", ALLOWED, seed=number).thresholds
        broken += float(found.is_harmed(thresholds).double().mean()) > ALLOWED
    return broken


def balanced_share(right: np.ndarray, labels: np.ndarray) -> float:
    """Mean, over the classes that occur, of how often their images are right."""
    return float(np.mean([right[labels == number].mean() for number in np.unique(labels)]))
