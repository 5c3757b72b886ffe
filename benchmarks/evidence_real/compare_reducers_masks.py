"""Table: masks with constant and with fitted schedules, without training.

The saliency model of the table `dense`, with the methods of the table `compare_reducers`: each with
the same number in every layer, and with the schedule that `tokendial.fit` found at the same cost on
64 training pictures without their masks. ToMe runs with the shipped preset, too. Beside them stand
smaller pictures at degree 0. IoU compares the masks with those at degree 0, S with the exact ones,
on test pictures of Cutouts; their objects and backgrounds are in no training picture. Masks are
computed in float32. Speed is measured in turns, in bfloat16, when nothing else runs.
"""

import functools
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

import tokendial as td
from benchmarks.evidence_real.common import Options, cached, in_processes
from benchmarks.evidence_real.compare_reducers import (
    BASELINE,
    COSTS,
    METHODS,
    Setting,
    compare_speeds,
    figure_of,
    kinds,
    unfitted_config,
)
from benchmarks.evidence_real.dense import focus_run
from benchmarks.evidence_real.masks import (
    IMG_SIZE,
    MEASURES,
    over_pictures,
    overlaps,
    predict_masks,
    test_pairs,
    training_pairs,
)
from benchmarks.evidence_real.matched_costs import nearest
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from benchmarks.evidence_real.zero_training import SMALLER
from tokendial.measure import Resampling
from tokendial.methods import to_json
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.runs import Run
from tokendial.tasks import BinaryMasks

SIDES = (210, 196, 182, 168, 154, 140)
"""Sides of smaller pictures in pixels."""
_PICTURES, _MINUTES = 64, 15.0
"""Training pictures of a fit, and its time limit."""
_BATCH = 8
"""Pictures of a timed batch."""
HEADER = ("method", "schedule", *(f"{100 * cost:.0f} %: IoU" for cost in COSTS),
          "60 %: lost / constant ToMe's", *(f"{100 * cost:.0f} %: S" for cost in COSTS),
          *(f"{100 * cost:.0f} %: speed" for cost in COSTS))  # fmt: skip


def load_model(
    side: int, config: ScheduledConfig | None, options: Options
) -> tuple[td.DialViT, BinaryMasks]:
    """The saliency model for pictures of a side in pixels, and the task that prepares them."""
    run = Run(focus_run(options, side))
    model = td.load(run.best, reduce=config).eval()
    if config is None:
        model.set_degree(0)
    return model, run.task()


def prepared(count: int, model: td.DialViT, task: BinaryMasks, options: Options) -> Tensor:
    """`count` random training pictures as the model takes them."""
    transform, train = task.image_transform(model.anatomy), training_pairs(options)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return torch.stack([transform(train[index][0]) for index in order[:count].tolist()])


def fitted(method: str, options: Options) -> dict[str, Any]:
    """The schedules that a fit finds, by cost, from a file if found before."""
    name = Setting(method, "fitted").name

    def compute() -> dict[str, Any]:
        model, task = load_model(IMG_SIZE, None, options)
        found = td.fit(
            model,
            prepared(_PICTURES, model, task, options),
            gmacs=[cost * model.cost().gmacs for cost in COSTS],
            reduce=METHODS[method],
            minutes=_MINUTES,
        )
        rows = zip(COSTS, found.degrees, strict=True)
        return {str(cost): list(row.found.removed) for cost, row in rows}

    return cached(options.out / "compare_reducers_masks" / f"{name}.json", compute)


@functools.cache
def reduce_config(setting: Setting, options: Options) -> ScheduledConfig | None:
    """A method with the schedule of a setting; None for smaller pictures and without a method."""
    if setting.method not in METHODS:
        return None
    if setting.schedule == "fitted":
        found = fitted(setting.method, options)
        return METHODS[setting.method].with_schedules([found[str(setting.cost)]])
    shape = load_model(IMG_SIZE, None, options)[0].anatomy.shape
    return unfitted_config(setting, shape, lambda config: share(IMG_SIZE, config, options))


@functools.cache
def _macs(side: int, config: ScheduledConfig | None, options: Options) -> int:
    return load_model(side, config, options)[0].cost().macs


def share(side: int, config: ScheduledConfig | None, options: Options) -> float:
    """Cost of a model as a share of that at degree 0, decoder included."""
    return _macs(side, config, options) / _macs(IMG_SIZE, None, options)


def side_of(setting: Setting, options: Options) -> int:
    """Side of the pictures in pixels."""
    if setting.method != SMALLER:
        return IMG_SIZE
    shares = [share(side, None, options) for side in SIDES]
    return SIDES[nearest(shares.__getitem__, len(SIDES), setting.cost)]


def predict(setting: Setting, options: Options) -> dict[str, Any]:
    """Scores and masks of the test pictures, as `predict_masks` returns them, and their "share"."""

    def compute() -> dict[str, Any]:
        side, config = side_of(setting, options), reduce_config(setting, options)
        found = predict_masks(*load_model(side, config, options), test_pairs(options))
        return found | {"share": np.array(share(side, config, options))}

    return cached(options.out / "compare_reducers_masks" / f"{setting.name}.npz", compute)


def compute(method: str, options: Options) -> None:
    """Predict the masks of a method at every cost."""
    for schedule in (schedule for name, schedule in kinds() if name == method):
        for cost in COSTS:
            predict(Setting(method, schedule, cost), options)


def speeds(options: Options) -> dict[str, float]:
    """Speed of every setting as a multiple of degree 0's."""
    images = prepared(_BATCH, *load_model(IMG_SIZE, None, options), options)

    def prepare(setting: Setting) -> tuple[td.DialViT, Tensor]:
        side = side_of(setting, options)
        model, _ = load_model(side, reduce_config(setting, options), options)
        return model, tvf.resize(images, [side, side])

    return cached(
        options.out / "compare_reducers_masks" / "speeds.json", lambda: compare_speeds(prepare)
    )


def rows(options: Options) -> list[dict[str, Any]]:
    """A row for each method, kind of schedule and cost."""
    full, fast = predict(Setting(), options), speeds(options)
    draws, s_measure = Resampling(len(full["scores"]), 1), MEASURES.index("s_measure")

    def lost(found: dict[str, Any]) -> np.ndarray:
        # Without a pixel in either mask, nothing is lost.
        shared = np.nan_to_num(overlaps(found["masks"], full["masks"]), nan=1.0)
        return resampled_scores(draws, mean, [1 - shared], np.zeros(len(shared)))

    found = []
    for (method, schedule), cost in itertools.product(kinds(), COSTS):
        setting = Setting(method, schedule, cost)
        own, baseline = predict(setting, options), predict(Setting(*BASELINE, cost), options)
        config = reduce_config(setting, options)
        found.append(
            {
                "data": "masks",
                "method": method,
                "schedule": schedule,
                "wanted": cost,
                "cost": float(own["share"]),
                "IoU": interval(1 - lost(own)),
                "IoU lost": interval(lost(own)),
                "lost / ToMe's": interval(lost(own) / lost(baseline)),
                "S": over_pictures([own["scores"][:, s_measure]]),
                "S minus degree 0": over_pictures([(own["scores"] - full["scores"])[:, s_measure]]),
                "speed": fast[setting.name],
                "img_size": side_of(setting, options),
                "reduce": config and to_json("reduce", config),
            }
        )
    return found


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each method and kind of schedule."""
    lines = []
    for kind, group in itertools.groupby(rows, key=lambda row: (row["method"], row["schedule"])):
        along = list(group)
        ratio = next(row["lost / ToMe's"] for row in along if row["wanted"] == 0.6)
        lines.append(
            (
                *kind,
                *(row["IoU"].percent() for row in along),
                f"{ratio.value:.2f} ({ratio.low:.2f}, {ratio.high:.2f})",
                *(row["S minus degree 0"].percent(sign=True) for row in along),
                *(f"{row['speed']:.2f}x" for row in along),
            )
        )
    return lines


def main(options: Options) -> None:
    """Predict all masks, time all settings, and write the table and a plot."""
    for side in (IMG_SIZE, *SIDES):  # here, because each process would convert them
        focus_run(options, side)
    predict(Setting(), options)
    in_processes(functools.partial(compute, options=options), (*METHODS, SMALLER), options)
    torch.set_num_threads(1)
    found = rows(options)
    result = {"costs": COSTS, "rows": plain(found)}
    figure = figure_of([found], "IoU lost", "100 - IoU with degree 0 (%)")
    write_table("compare_reducers_masks", HEADER, cells(found), result, figure)
