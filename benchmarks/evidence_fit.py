"""Fitted and constant schedules compared at the same measured time, on real images.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks evidence_fit

The shipped small ViT runs on the task that it was pre-trained for: which of ten kinds of items does
a scene show? For each seed, `fit` gets random training scenes without labels, and searches a
schedule of ToMe for each speed-up. Then the unreduced model, the fitted schedules and ToMe with
several constant r are timed in turns; times are medians of the ratios to the unreduced model within
rounds. Agreement with the unreduced model, and accuracy, are measured on other scenes. The value of
a constant r at the time of a fitted schedule is interpolated between the two neighbouring r.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner, alternate, ratio
from benchmarks.report import write_json
from tokendial.backbones import Backbone
from tokendial.data import Scenes
from tokendial.data.transforms.image import Augment
from tokendial.runs.loaders import eval_loader
from tokendial.tasks import Classification
from tokendial.tune.agreement import binary_logits, compare_logits

SEEDS = (0, 1, 2)
# Scenes to compare on have another seed, and validation items that no training scene shows.
HELD_OUT_SEED = 100
CONSTANT = (*range(1, 13), 14, 16, 20, 24, 32)
METRICS = ("divergence", "agreement", "accuracy")


def scenes(split: str, seed: int, size: int, model: td.DialViT) -> tuple[Tensor, Tensor]:
    """Prepared images [N, 3, H, W] and their labels [N, 10]."""
    task = Classification(10, multi_label=True, augment=Augment(crop=False, test_crop_ratio=1.0))
    data = Scenes(task="present", train_size=size, val_size=size).build(seed)
    loader = eval_loader(getattr(data, split), task.eval_transform(model.anatomy), batch_size=size)
    images, labels = next(iter(loader))
    return images, labels


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of many images, computed in batches."""
    return torch.cat([model(batch) for batch in images.split(50)])


@torch.no_grad()
def relative_times(models: Sequence[nn.Module], images: Tensor, repeats: int) -> list[float]:
    """Time of each model as a fraction of the first model's."""
    runners = {n: Runner(functools.partial(model, images)) for n, model in enumerate(models)}
    turns = alternate(runners, repeats=repeats)
    return [1 / ratio(turns[0], turns[n]).median for n in runners]


def measure_agreement(
    models: Sequence[nn.Module], images: Tensor, labels: Tensor
) -> list[dict[str, float]]:
    """Agreement of each model with the first one, and its accuracy."""
    unreduced = logits_of(models[0], images)
    rows = []
    for model in models:
        logits = logits_of(model, images)
        agreement = compare_logits(binary_logits(logits), binary_logits(unreduced))
        right = ((logits > 0) == (labels > 0)).float().mean()
        rows.append(
            {
                "divergence": agreement.divergence,
                "agreement": 100 * agreement.top1,
                "accuracy": 100 * float(right),
            }
        )
    return rows


def interpolate_at_time(curve: Sequence[dict[str, Any]], time: float, metric: str) -> float:
    """A metric of constant schedules at `time`, interpolated between the two nearest ones.

    If all of them are slower, this is the value of the fastest one.
    """
    rising = sorted(curve, key=lambda row: row["time"])
    xs, ys = [row["time"] for row in rising], [row[metric] for row in rising]
    return float(np.interp(time, xs, ys))


def measure_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fit, and measure all schedules side by side."""
    vit = Backbone(name="scenes_vit", weights="shipped").create().eval()
    unreduced = td.wrap(vit).eval()
    images, _ = scenes("train", seed, options.images, unreduced)
    fitted = td.fit(
        unreduced,
        images,
        speedup=[float(speedup) for speedup in options.speedup.split(",")],
        multi_label=True,
        batch_size=options.batch,
        minutes=options.minutes,
        note=print,
    )
    found = []
    for row in fitted.degrees:
        found.append(td.wrap(vit, reduce=fitted.reduce).eval())
        found[-1].set_degree(row.degree)
    constant = [td.wrap(vit, reduce=td.ToMe(r=r)).eval() for r in CONSTANT]
    models = [unreduced, *found, *constant]
    held_out, labels = scenes("val", HELD_OUT_SEED, options.test, unreduced)
    shares = relative_times(models, held_out[: options.batch], options.repeats)
    rows = [
        {"time": share} | row
        for share, row in zip(shares, measure_agreement(models, held_out, labels), strict=True)
    ]
    curve = [rows[0], *rows[1 + len(found) :]]
    return {
        "seed": seed,
        "unreduced": rows[0],
        "constant": dict(zip(CONSTANT, curve[1:], strict=True)),
        "fitted": [
            {
                "speedup": degree.budget,
                "removed": degree.found.removed,
                "found": row,
                "constant": {
                    metric: interpolate_at_time(curve, row["time"], metric) for metric in METRICS
                },
            }
            for degree, row in zip(fitted.degrees, rows[1 : 1 + len(found)], strict=True)
        ],
    }


def table(results: Sequence[dict[str, Any]]) -> None:
    """Print means and standard deviations over seeds, speed-up by speed-up."""
    header = ("budget", "measured", "schedule", "divergence", "same answers (%)", "accuracy (%)")
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for rows in zip(*(result["fitted"] for result in results), strict=True):
        speedup = spread([1 / row["found"]["time"] for row in rows], 2)
        for name, key in (("fitted", "found"), ("constant r", "constant")):
            cells = [
                spread([row[key][metric] for row in rows], 4 if metric == "divergence" else 1)
                for metric in METRICS
            ]
            print(f"| {rows[0]['speedup']:g} | {speedup} | {name} | {' | '.join(cells)} |")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main(arguments: list[str]) -> None:
    """Fit and measure for every seed, print the table, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks evidence_fit", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--speedup", default="1.5,2,2.5")
    parser.add_argument("--images", type=int, default=256, help="Scenes that a fit may use.")
    parser.add_argument("--test", type=int, default=2000, help="Scenes to compare on.")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="Time limit of each fit, in minutes."
    )
    parser.add_argument("--repeats", type=int, default=21, help="Number of rounds of timing.")
    parser.add_argument("--out", type=Path, help="Folder for the results.")
    options = parser.parse_args(arguments)
    results = [measure_seed(seed, options) for seed in SEEDS]
    table(results)
    settings = {
        name: getattr(options, name) for name in ("images", "test", "batch", "minutes", "repeats")
    }
    write_json("evidence_fit", settings | {"seeds": results}, out=options.out)
