"""Table: DAR and DAR* trained for masks on Cutouts, with DINOv2-S at 224 pixels.

They are compared with a linear decoder on the frozen backbone, and with DAR's adapters and decoder
without token reduction. The models after the last epoch are used. No object or background of the
test pictures is in a training picture. Cost is that of one picture, as a share of the cost of the
linear decoder with the frozen backbone. Differences are those to the model that processes all
tokens with the same seed, on the same pictures. Speed is that of the first seed's models on one
thread, in float32 and in batches of 16; the models take turns, and times are those of the
processor, so that other programs on the machine disturb them less.
"""

import functools
import time
from typing import Any

import numpy as np
import torch

from benchmarks.evidence_real.common import SEEDS, Options, cached, in_processes, in_threads
from benchmarks.evidence_real.mask_models import (
    FULL,
    KINDS,
    LINEAR,
    PARTS,
    MaskModel,
    degrees_to_run,
    trained_models,
)
from benchmarks.evidence_real.masks import MEASURES, score_intervals, test_pairs
from benchmarks.evidence_real.results import plain, write_table
from tokendial.runs import Run

_BATCH, _ROUNDS = 16, 7
HEADER = ("model", "tokens in FFNs", "cost", "S", "minus all tokens", "mean F",
          "minus all tokens", "weighted F", "MAE", "images/s")  # fmt: skip


def evaluate(model: MaskModel, options: Options) -> None:
    """Predict the masks of the test pictures at the degrees of the table."""
    for degree in degrees_to_run(model, options):
        model.predict(degree, options)


def measure_speed(options: Options) -> dict[str, Any]:
    """Images per second of each kind's first model at the degrees of the table."""
    torch.set_num_threads(1)
    models = [MaskModel(kind, SEEDS[0]) for kind in (*KINDS, *PARTS)]
    loaded = {model.kind: model.load(options) for model in models}
    turns = [(m.kind, degree) for m in models for degree in degrees_to_run(m, options)]
    task, pairs = Run(models[0].folder(options)).task(), test_pairs(options)
    transform = task.image_transform(loaded[LINEAR].anatomy)
    images = torch.stack([transform(pairs[index][0]) for index in range(_BATCH)])
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):  # the first round warms up
            for kind, degree in turns:
                loaded[kind].set_degree(degree)
                start = time.process_time()
                loaded[kind](images)
                times[kind, degree].append(time.process_time() - start)
    return {
        f"{kind}, {degree}": [_BATCH / seconds for seconds in taken[1:]]
        for (kind, degree), taken in times.items()
    }


def table(options: Options) -> list[dict[str, Any]]:
    """The rows: each kind at each of its degrees."""
    whole = _mean_of([MaskModel(LINEAR, seed).predict(0, options) for seed in SEEDS], "macs")
    reference = {seed: MaskModel(FULL, seed).predict(0, options)["scores"] for seed in SEEDS}
    speeds = cached(options.out / "dense" / "speed.json", lambda: measure_speed(options))
    rows = []
    for kind in (*KINDS, *PARTS):
        seeds = SEEDS if kind in KINDS else SEEDS[:1]
        models = [MaskModel(kind, seed) for seed in seeds]
        degrees = [degrees_to_run(model, options) for model in models]
        for of_seed in zip(*degrees, strict=True):
            found = [m.predict(d, options) for m, d in zip(models, of_seed, strict=True)]
            row: dict[str, Any] = {"model": kind, "seeds": len(seeds), "degrees": of_seed}
            row |= {"share": _mean_of(found, "share"), "cost": _mean_of(found, "macs") / whole}
            row |= score_intervals([f["scores"] for f in found], [reference[s] for s in seeds])
            row["images/s"] = speeds[f"{kind}, {of_seed[0]}"]
            rows.append(row)
    return rows


def _mean_of(found: list[dict[str, np.ndarray]], name: str) -> float:
    return float(np.mean([float(each[name]) for each in found]))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row as text."""
    seeds = "" if row["seeds"] > 1 else " (1 seed)"
    texts = [f"{row['model']}{seeds}", f"{100 * row['share']:.0f} %", f"{100 * row['cost']:.0f} %"]
    for name in ("s_measure", "mean_f"):
        difference = row[f"{name}, difference"].percent(sign=True)
        texts += [row[name].percent(), "-" if row["model"] == FULL else difference]
    texts += [row[name].percent() for name in ("weighted_f", "mae")]
    return (*texts, f"{np.median(row['images/s']):.1f}")


def main(options: Options) -> None:
    """Train, predict, measure, and write the table."""
    in_threads(lambda model: model.train(options), trained_models(), options)
    in_processes(functools.partial(evaluate, options=options), trained_models(), options)
    rows = table(options)
    result = {"measures": MEASURES, "rows": plain(rows)}
    write_table("dense_trained", HEADER, [cells(row) for row in rows], result)
