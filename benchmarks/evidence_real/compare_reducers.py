"""Table: reduction methods with constant and with fitted schedules, without training.

Every method that removes tokens by number runs with the same number in each layer, and with the
schedule that `tokendial.fit` found at the same cost on 128 training images without their labels.
ToMe runs with the shipped preset, too, which was fitted on other pictures at another size. Beside
them stands what anyone can do without a method: smaller images at degree 0. The test images are
judged as in the table `zero_training`: "changed" are answers of nearest neighbours, among training
images at the same degree, that are others than at degree 0. "Probe" are those of a linear
classifier that was trained on features of degree 0 only. Speed is measured in turns, in bfloat16,
when nothing else runs.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

import tokendial as td
from benchmarks.evidence_real.common import BACKBONE, Options, cached, in_processes
from benchmarks.evidence_real.matched_costs import Reduction, nearest
from benchmarks.evidence_real.results import plain, write_table
from benchmarks.evidence_real.statistics import interval, mean, resampled_scores
from benchmarks.evidence_real.zero_training import (
    DATA,
    IMG_SIZE,
    SMALLER,
    backbone,
    compute_features,
    features,
    load_data,
    per_image,
    resampling,
    side_and_config,
)
from tokendial.measure.timing import time_in_rounds
from tokendial.methods import to_json
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.shape import ViTShape
from tokendial.tune.schedules import ScheduleSpace

COSTS = (0.8, 0.6, 0.4)
"""Wanted multiply-accumulates, as shares of those at degree 0."""
METHODS: dict[str, ScheduledConfig] = {
    "ToMe": td.ToMe(),
    "PiToMe": td.PiToMe(),
    "PruneMerge, half dropped": td.PruneMerge(),
    "EViT in each layer, drop": td.EViT(r=8, rest="drop"),
    "EViT in each layer, fuse": td.EViT(r=8),
}
BASELINE = ("ToMe", "constant")
SECONDS = 4.0
"""Time to spend on timing each setting."""
_IMAGES, _MINUTES = 128, 30.0
"""Training images of a fit, and its time limit."""
_PROBE_C = 0.1
"""Inverse strength of the linear classifier's weight decay, not tuned."""
_BATCH = 8
"""Images of a timed batch."""
HEADER = ("data", "method", "schedule", *(f"{100 * cost:.0f} %: accuracy" for cost in COSTS),
          *(f"{100 * cost:.0f} %: changed" for cost in COSTS),
          "60 %: changed / constant ToMe's", "60 %: probe's changed",
          "60 %: probe's changed / constant ToMe's",
          *(f"{100 * c:.0f} %: speed" for c in COSTS))  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A method with a schedule of a wanted cost."""

    method: str = "none"
    """One of `METHODS`, `SMALLER`, or "none"."""
    schedule: str = "none"
    """"constant", "fitted" or "preset"; "none" for smaller images and without a method."""
    cost: float = 1.0
    """One of `COSTS`; 1 without a method."""

    @property
    def name(self) -> str:
        """Name for files."""
        words = f"{self.method}-{self.schedule}-{100 * self.cost:.0f}"
        return words.lower().replace(",", "").replace(" ", "_")


def kinds() -> list[tuple[str, str]]:
    """Each method with the kinds of its schedules, and smaller images."""
    methods = itertools.product(METHODS, ("constant", "fitted"))
    return [*methods, ("ToMe", "preset"), (SMALLER, "none")]


def fitted(data: str, method: str, options: Options) -> dict[str, Any]:
    """The schedules that a fit finds for a data set, by cost, from a file if found before."""
    name = Setting(method, "fitted", 1.0).name
    path = options.out / "compare_reducers" / data / f"{name}.json"

    def compute() -> dict[str, Any]:
        images, _ = load_data(data, options)["train"]
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_IMAGES]
        model = td.wrap(backbone(IMG_SIZE, options)).eval()
        found = td.fit(
            model,
            tvf.normalize(images[drawn] / 255, *model.anatomy.statistics),
            gmacs=[cost * model.cost().gmacs for cost in COSTS],
            reduce=METHODS[method],
            minutes=_MINUTES,
            batch_size=32,
        )
        rows = zip(COSTS, found.degrees, strict=True)
        return {str(cost): list(row.found.removed) for cost, row in rows}

    return cached(path, compute)


def share(config: ScheduledConfig | None, options: Options) -> float:
    """Cost at degree 1 or at its r, as a share of that at degree 0."""
    return _macs(config, options) / _macs(None, options)


@functools.cache
def _macs(config: ScheduledConfig | None, options: Options) -> int:
    return td.wrap(backbone(IMG_SIZE, options), reduce=config).cost().macs


@functools.cache
def reduce_config(setting: Setting, data: str, options: Options) -> ScheduledConfig | None:
    """A method with the schedule of a setting; None for smaller images and without a method."""
    if setting.method not in METHODS:
        return None
    if setting.schedule == "fitted":
        found = fitted(data, setting.method, options)
        return METHODS[setting.method].with_schedules([found[str(setting.cost)]])
    shape = td.wrap(backbone(IMG_SIZE, options)).anatomy.shape
    return unfitted_config(setting, shape, lambda config: share(config, options))


def unfitted_config(
    setting: Setting, shape: ViTShape, share: Callable[[ScheduledConfig], float]
) -> ScheduledConfig:
    """A method with the constant schedule, or the scaled preset, that is nearest to a cost.

    Args:
        setting: Its schedule is "constant" or "preset".
        shape: Shape of the backbone.
        share: Gives the cost of a method, as a share of that at degree 0.
    """
    method = METHODS[setting.method]
    space = ScheduleSpace(method, shape)
    if setting.schedule == "constant":
        schedules = space.all_linear()[1:]
    else:
        speeds = td.preset(BACKBONE).r
        near = min(speeds, key=lambda r: abs(share(method.with_schedules([r])) - setting.cost))
        counts = space.normalise(near.counts(shape.num_patches))
        schedules = [space.scaled(counts, percent / 100) for percent in range(20, 200)]
    configs = [method.with_schedules([schedule]) for schedule in schedules]
    best = nearest(lambda position: share(configs[position]), len(configs), setting.cost)
    return configs[best]


def values(setting: Setting, data: str, options: Options) -> dict[str, Any]:
    """Features of a setting and its "share" of the cost, from a file if computed before."""
    if setting.method == SMALLER:
        return features(data, Reduction(SMALLER, setting.cost), options)
    path = options.out / "compare_reducers" / data / f"{setting.name}.npz"

    def compute() -> dict[str, Any]:
        config = reduce_config(setting, data, options)
        found = compute_features(data, IMG_SIZE, config, options)
        return {"share": np.array(share(config, options)), **found}

    return cached(path, compute)


def compute(item: tuple[str, str], options: Options) -> None:
    """Compute what the table needs of a data set and a method."""
    data, method = item
    for schedule in (schedule for name, schedule in kinds() if name == method):
        for cost in COSTS:
            values(Setting(method, schedule, cost), data, options)


def side_of(setting: Setting, options: Options) -> int:
    """Side of the images in pixels."""
    if setting.method != SMALLER:
        return IMG_SIZE
    return side_and_config(Reduction(SMALLER, setting.cost), options)[0]


def speeds(options: Options) -> dict[str, float]:
    """Speed of every setting (with the schedules of solar cells) as a multiple of degree 0's."""
    full = load_data("elpv", options)["test"][0][:_BATCH] / 255

    def prepare(setting: Setting) -> tuple[td.DialViT, Tensor]:
        side, config = side_of(setting, options), reduce_config(setting, "elpv", options)
        model = td.wrap(backbone(side, options), reduce=config).eval()
        return model, tvf.resize(full, [side, side], antialias=True)

    return cached(options.out / "compare_reducers" / "speeds.json", lambda: compare_speeds(prepare))


def compare_speeds(prepare: Callable[[Setting], tuple[td.DialViT, Tensor]]) -> dict[str, float]:
    """Speed of every setting as a multiple of degree 0's, in bfloat16; all take turns.

    Args:
        prepare: Makes the model of a setting and its batch.
    """
    settings = [Setting(*kind, cost) for kind in kinds() for cost in COSTS]

    @torch.inference_mode()
    def run(prepared: tuple[td.DialViT, Tensor]) -> None:
        model, images = prepared
        with torch.autocast("cpu", torch.bfloat16):
            model(images)

    timings = time_in_rounds(
        [Setting(), *settings], prepare, run, device=torch.device("cpu"), seconds=SECONDS
    )
    first, *others = (timing.seconds for timing in timings)
    return {s.name: first / seconds for s, seconds in zip(settings, others, strict=True)}


def linear_probe(full: dict[str, np.ndarray]) -> Pipeline:
    """A logistic regression on standardised training features at degree 0."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_PROBE_C, max_iter=2000))
    return probe.fit(full["train"], full["train labels"])


def rows_of(data: str, options: Options) -> list[dict[str, Any]]:
    """The rows of a data set."""
    full, draws = features(data, Reduction(), options), resampling(data, options)
    unreduced, fast = per_image(full, full), speeds(options)
    probe, labels = linear_probe(full), full["test labels"]
    whole = probe.predict(full["test"])

    def scores(of_images: np.ndarray) -> np.ndarray:
        return resampled_scores(draws, mean, [of_images], np.zeros(len(of_images)))

    rows, changed, probe_changed = [], dict[Any, np.ndarray](), dict[Any, np.ndarray]()
    for (method, schedule), cost in itertools.product(kinds(), COSTS):
        setting, key = Setting(method, schedule, cost), (method, schedule, cost)
        config = reduce_config(setting, data, options)
        found = values(setting, data, options)
        each, answers = per_image(found, full), probe.predict(found["test"])
        right = (answers == labels).astype(float) - (whole == labels)
        changed[key] = scores(1 - each["agreement"])
        probe_changed[key] = scores((answers != whole).astype(float))
        with np.errstate(divide="ignore", invalid="ignore"):  # draws without a changed answer
            ratio = changed[key] / changed[(*BASELINE, cost)]
            probe_ratio = probe_changed[key] / probe_changed[(*BASELINE, cost)]
        rows.append(
            {
                "data": data,
                "method": method,
                "schedule": schedule,
                "wanted": cost,
                "cost": float(found["share"]),
                "accuracy": interval(scores(each["same degree"])),
                "accuracy minus degree 0": interval(
                    scores(each["same degree"] - unreduced["same degree"])
                ),
                "changed": interval(changed[key]),
                "changed / ToMe's": interval(ratio),
                "probe minus degree 0": interval(scores(right)),
                "probe changed": interval(probe_changed[key]),
                "probe changed / ToMe's": interval(probe_ratio),
                "cosine": interval(scores(each["cosine"])),
                "speed": fast[setting.name],
                "img_size": side_of(setting, options),
                "reduce": config and to_json("reduce", config),
            }
        )
    return rows


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each method and kind of schedule of one data set."""
    lines = []
    for _, group in itertools.groupby(rows, key=lambda row: (row["method"], row["schedule"])):
        along = list(group)
        middle = next(row for row in along if row["wanted"] == 0.6)
        ratio, probe_ratio = middle["changed / ToMe's"], middle["probe changed / ToMe's"]
        lines.append(
            (
                along[0]["data"],
                along[0]["method"],
                along[0]["schedule"],
                *(row["accuracy minus degree 0"].percent(sign=True) for row in along),
                *(row["changed"].percent() for row in along),
                f"{ratio.value:.2f} ({ratio.low:.2f}, {ratio.high:.2f})",
                middle["probe changed"].percent(),
                f"{probe_ratio.value:.2f} ({probe_ratio.low:.2f}, {probe_ratio.high:.2f})",
                *(f"{row['speed']:.2f}x" for row in along),
            )
        )
    return lines


def figure_of(
    by_data: list[list[dict[str, Any]]], what: str = "changed", label: str = "changed answers (%)"
) -> Figure:
    """A value over the cost, a plot for each data set; fitted schedules are solid lines.

    Args:
        by_data: The rows of each data set.
        what: Name of the value in a row.
        label: What the axis says.
    """
    figure = Figure(figsize=(1 + 4 * len(by_data), 5.4), layout="constrained")
    axes = figure.subplots(1, len(by_data), squeeze=False)[0]
    colors = {SMALLER: "black"} | {m: f"C{number}" for number, m in enumerate(METHODS)}
    styles = {"none": "-", "fitted": "-", "constant": ":", "preset": "--"}
    for axis, rows in zip(axes, by_data, strict=True):
        for (method, schedule), group in itertools.groupby(
            rows, key=lambda row: (row["method"], row["schedule"])
        ):
            along = list(group)
            found = [row[what] for row in along]
            axis.errorbar(
                [100 * row["cost"] for row in along],
                [100 * each.value for each in found],
                [
                    [100 * (each.value - each.low) for each in found],
                    [100 * (each.high - each.value) for each in found],
                ],
                color=colors[method],
                linestyle=styles[schedule],
                capsize=2,
                linewidth=1.2,
                elinewidth=0.5,
                label=method if schedule == "none" else f"{method}, {schedule}",
            )
        axis.set(title=rows[0]["data"], xlabel="cost (% of degree 0)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


def main(options: Options) -> None:
    """Compute the features of all settings, time them, and write the table and a plot."""
    # The slowest items first, so that no process is left with one at the end.
    items = list(itertools.product(reversed(DATA), (*METHODS, SMALLER)))
    in_processes(functools.partial(compute, options=options), items, options)
    torch.set_num_threads(1)
    by_data = [rows_of(data, options) for data in DATA]
    lines = itertools.chain.from_iterable(map(cells, by_data))
    rows = list(itertools.chain.from_iterable(by_data))
    results = {"costs": COSTS, "rows": plain(rows)}
    write_table("compare_reducers", HEADER, lines, results, figure_of(by_data))
