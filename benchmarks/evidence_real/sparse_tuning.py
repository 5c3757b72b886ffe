"""Table: Sparse-Tuning against other fine-tuning on ELPV: scores, cost of training, speed.

All train by the recipes of recipes/real/elpv, at 112 pixels.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokendial as td
from benchmarks.evidence_real.classifiers import (
    Classifier,
    Setting,
    bootstrap,
    predict,
)
from benchmarks.evidence_real.common import THREE_SEEDS, Options, cached, in_processes, in_threads
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import (
    Metric,
    accuracy,
    auroc,
    balanced_accuracy,
    interval,
)
from benchmarks.memory import peak_of
from tokendial.measure import Timing, time_in_rounds
from tokendial.runs import Run
from tokendial.train.objective import Objective

METHODS = ("linear", "adaptformer", "lora", "sparse_tuning", "full")
BATCH = 32
HEADER = ("method", "trained (M)", "GMACs", "accuracy", "balanced accuracy", "AUROC")
COSTS = ("s / training step", "MiB", "images/s")


def main(options: Options) -> None:
    """Train, predict, time, and write the table."""
    write("sparse_tuning", 112, METHODS, options)


def trained(method: str, seed: int, side: int) -> Classifier:
    """The classifier that a recipe of real/elpv trains, on images of a side in pixels."""
    return Classifier("elpv", method, seed, img_size=side, by_recipe=True)


def write(name: str, side: int, methods: Sequence[str], options: Options) -> None:
    """Train by recipes at an image size, predict, time, and write a table.

    The second method is what the others are compared with, on the same images.
    """
    classifiers = [trained(*each, side) for each in itertools.product(methods, THREE_SEEDS)]
    classifiers.sort(key=lambda one: one.seed)
    in_threads(lambda one: one.train(options), classifiers, options)
    in_processes(functools.partial(_predict, options=options), classifiers, options)
    speeds = cached(
        options.out / f"speed-{name}.json", functools.partial(speed, methods, side, options)
    )
    rows = [row(method, methods[1], side, speeds[method], options) for method in methods]
    header = (*HEADER, f"minus {methods[1]}", *COSTS)
    write_table(name, header, [each["cells"] for each in rows], {"rows": rows})


def _predict(one: Classifier, options: Options) -> None:
    predict(one, Setting(), options)


def row(
    method: str, base: str, side: int, speeds: dict[str, float], options: Options
) -> dict[str, Any]:
    """A row of the table; its accuracy is compared with that of the method `base`."""

    def found(name: str, metric: Metric) -> np.ndarray:
        asked = [(trained(name, seed, side), Setting()) for seed in THREE_SEEDS]
        return bootstrap(asked, metric, options)

    scores = [interval(found(method, metric)) for metric in (accuracy, balanced_accuracy, auroc)]
    cells = [method, f"{speeds['trained'] / 1e6:.2f}", f"{speeds['gmacs']:.2f}"]
    cells += [score.percent() for score in scores]
    if method != base:
        difference = found(method, accuracy) - found(base, accuracy)
        cells.append(interval(difference).percent(sign=True))
    else:
        cells.append("-")
    cells += [f"{speeds['step_s']:.2f}", f"{speeds['mib']:.0f}", f"{speeds['images_per_s']:.0f}"]
    return {"cells": cells, "accuracy": scores[0].value} | speeds


class Measured:
    """A trained classifier whose training step and prediction are timed."""

    def __init__(self, folder: Path) -> None:
        run = Run(folder)
        self.model = td.load(run.last)
        self.model.set_degree(self.model.reducer.degree if self.model.reducer else 0)
        side = self.model.anatomy.image_size
        self.images = torch.randn(BATCH, 3, *side, generator=torch.Generator().manual_seed(0))
        self.targets = torch.arange(BATCH) % self.model.num_classes
        self.objective = Objective(self.model, run.task())
        self.optimizer = torch.optim.AdamW(self.model.trainable_parameters(), lr=1e-6)

    def train(self) -> None:
        """Do one update in bfloat16."""
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = self.objective(self.images, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def predict(self) -> None:
        """Compute the logits of a batch in bfloat16."""
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            self.model(self.images)


def speed(methods: Sequence[str], side: int, options: Options) -> dict[str, dict[str, float]]:
    """Time and memory of a training step and images/s afterwards; the methods take turns."""
    torch.set_num_threads(1)
    models = [
        Measured(options.out / "runs" / trained(method, THREE_SEEDS[0], side).name)
        for method in methods
    ]
    for model in models:  # the first update creates the state of the optimizer
        model.train()
    mib = [peak_of(model.train).whole / 2**20 for model in models]
    steps = _times(models, Measured.train)
    passes = _times(models, Measured.predict)
    return {
        method: {
            "trained": model.model.cost().trainable_params,
            "gmacs": model.model.cost().gmacs,
            "step_s": step.seconds,
            "mib": memory,
            "images_per_s": BATCH / one_pass.seconds,
            "spread": max(step.spread, one_pass.spread),
        }
        for method, model, memory, step, one_pass in zip(
            methods, models, mib, steps, passes, strict=True
        )
    }


def _times(models: Sequence[Measured], work: Callable[[Measured], None]) -> list[Timing]:
    """Times of the same work of all models, in turns."""
    cpu = torch.device("cpu")
    return time_in_rounds(models, lambda model: model, work, device=cpu, seconds=10.0)
