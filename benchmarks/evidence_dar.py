"""DAR and DAR* against a linear decoder on the frozen backbone, on real objects with exact masks.

    python tools/build_cutouts.py --out cutouts --task saliency
    python -m benchmarks evidence_dar --data cutouts/saliency --jobs 2

The shipped small ViT at 72 pixels is trained to outline objects (recipe dar/cutouts): with a linear
decoder only, with DAR, and with DAR*. Each is trained with three seeds, which change decoders,
adapters and the order of images. The models after the last epoch are used, because the validation
set has too few backgrounds to choose an epoch by. Objects and backgrounds of the test images are in
no training image. DAR's models also run at every degree of the dial, with thresholds that were
found on training images. This is small-scale evidence that the method works. It does not show which
scores to expect on public data sets.

Runs are written to --out; the same command continues an interrupted one. Each run has one thread.
Results go to benchmarks/results/evidence_dar_HARDWARE_DATE.json.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tokendial as td
from benchmarks.evidence_real.common import run_tokendial
from benchmarks.report import write_json
from tokendial.measure import ShareMeter
from tokendial.runs import Run
from tokendial.runs.evaluate import evaluate_loader
from tokendial.runs.loaders import eval_loader

METHODS: dict[str, list[str]] = {
    "linear decoder, frozen": [
        *("reduce=null", "adapt={name: linear}", "decode={name: linear}", "train.lr=1e-2")
    ],
    "DAR": [],
    "DAR*": ["distill={weight: 0.1}"],
}
SEEDS = (0, 1, 2)
MEASURES = ("mean_f", "s_measure", "weighted_f", "max_f", "mean_e", "mae")


@dataclass(frozen=True)
class TrainingRun:
    """One run: a method and a seed."""

    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """The folder of the run."""
        name = self.method.replace("*", " star").replace(",", "")
        return out / f"{name}-{self.seed}".lower().replace(" ", "_")

    def train(self, options: argparse.Namespace) -> None:
        """Train the run, or resume it; a finished one is left as it is."""
        run_tokendial(
            *("train", "dar/cutouts", f"output={self.folder(options.out)}"),
            *(f"seed={self.seed}", f"data.root={options.data}", *METHODS[self.method]),
        )
        print(self.folder(options.out), flush=True)

    def measured(self, out: Path) -> list[dict[str, float]]:
        """Scores on the test images, cost and fraction of tokens, at each degree of the dial."""
        torch.set_num_threads(1)
        run = Run(self.folder(out))
        model, task = td.load(run.last), run.task()
        test = replace(run.recipe().data, val="test").build(self.seed).val
        loader = eval_loader(test, task.eval_transform(model.anatomy), batch_size=50)
        meter = ShareMeter(model) if ShareMeter.supports(model) else None
        rows = []
        for degree in model.degrees:
            model.set_degree(degree)
            with meter or nullcontext():
                scores = evaluate_loader(model, loader, task)
            row = {name: 100 * scores[name] for name in MEASURES}
            row |= {"gmacs": model.cost().gmacs, "share": 100 * meter.share if meter else 100.0}
            rows.append(row)
        return rows


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, as text."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def trained_degree(method: str) -> int:
    """The degree at which a method's models were trained."""
    return 0 if "reduce=null" in METHODS[method] else 5


def table(found: dict[TrainingRun, list[dict[str, float]]]) -> None:
    """Print the scores of each method at the degree that it was trained at."""
    names = ("mean F", "S", "weighted F", "max F", "mean E", "MAE")
    print(f"\n| method | tokens in FFNs | MMACs | {' | '.join(names)} |")
    print("|---" * (len(names) + 3) + "|")
    for method in METHODS:
        rows = [found[TrainingRun(method, seed)][trained_degree(method)] for seed in SEEDS]
        scores = " | ".join(spread([row[name] for row in rows]) for name in MEASURES)
        macs = 1000 * statistics.mean(row["gmacs"] for row in rows)
        share = spread([row["share"] for row in rows])
        print(f"| {method} | {share} % | {macs:.0f} | {scores} |")


def dial(found: dict[TrainingRun, list[dict[str, float]]], method: str) -> None:
    """Print the scores of a method at every degree."""
    print(f"\n| {method}: degree | tokens in FFNs | MMACs | mean F | S |")
    print("|---" * 5 + "|")
    runs = [found[TrainingRun(method, seed)] for seed in SEEDS]
    for degree, rows in enumerate(zip(*runs, strict=True)):
        share, f, s = (spread([row[n] for row in rows]) for n in ("share", "mean_f", "s_measure"))
        macs = 1000 * statistics.mean(row["gmacs"] for row in rows)
        print(f"| {degree} | {share} % | {macs:.0f} | {f} | {s} |")


def main(arguments: list[str]) -> None:
    """Train, measure, print the tables, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks evidence_dar", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path("cutouts/saliency"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_dar"))
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    wanted = [TrainingRun(method, seed) for method in METHODS for seed in SEEDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(functools.partial(TrainingRun.train, options=options), wanted))
    with ProcessPoolExecutor(options.jobs) as processes:
        measured = processes.map(functools.partial(TrainingRun.measured, out=options.out), wanted)
        found = dict(zip(wanted, measured, strict=True))
    table(found)
    for method in ("DAR", "DAR*"):
        dial(found, method)
    settings = json.loads((options.data / "settings.json").read_text())
    result: dict[str, Any] = {
        "data": settings,
        "runs": [
            {"method": tuned.method, "seed": tuned.seed, "degrees": rows}
            for tuned, rows in found.items()
        ],
    }
    write_json("evidence_dar", {"batch": 10} | result)
