"""Table: masks of a saliency model along the dial, without training.

The saliency decoder on DINOv2-S was trained by others, for the unreduced backbone. It runs with
reduction methods at about 90, 80, 70 and 60 % of the cost. IoU compares its masks with those of the
unreduced model, on the test pictures of Cutouts and on photographs; the other scores compare them
with the exact masks of Cutouts. Photographs in which the unreduced model finds less than 1 % of the
picture are left out, since a mask of a few pixels overlaps by chance. All is computed in float32.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

import tokendial as td
from benchmarks.evidence_real.common import (
    Options,
    cached,
    in_processes,
    run_tokendial,
)
from benchmarks.evidence_real.masks import (
    IMG_SIZE,
    MEASURES,
    SQUARES,
    over_pictures,
    overlaps,
    predict_masks,
    score_intervals,
    squares,
    test_pairs,
)
from benchmarks.evidence_real.matched_costs import Reduction, reduce_config, reductions
from benchmarks.evidence_real.results import plain, write_table
from tokendial.runs import Run

FAMILIES = ("ToMe", "FFN merging", "EViT in 3 layers, fuse")
PICTURES = ("cutouts", "photographs")
_SMALLEST = 0.01
"""Fraction of a photograph that its mask covers at least."""
HEADER = ("method", "cost", "IoU with degree 0", "IoU, photographs", "S", "minus degree 0",
          "mean F", "minus degree 0")  # fmt: skip


def focus_run(options: Options, side: int = IMG_SIZE) -> Path:
    """Folder of the run with the saliency model, which is converted if it is missing.

    Args:
        options: The options.
        side: Side of the pictures in pixels.
    """
    folder = options.out / "runs" / ("focus" if side == IMG_SIZE else f"focus-{side}")
    if not Run(folder).best.exists():
        words = ["weights", "convert", str(options.onnx), "--recipe", "real/focus"]
        words += ["--out", str(folder), f"model.weights={options.weights.resolve()}"]
        words += [f"model.img_size={side}"]
        run_tokendial(*words, f"data.root={options.cutouts.resolve()}")
    return folder


def predict(reduction: Reduction, pictures: str, options: Options) -> dict[str, np.ndarray]:
    """Scores and masks with a reduction method, as `predict_masks` returns them.

    "share" is the cost, as a share of that of the unreduced model.
    """
    path = options.out / "dense" / f"{pictures}-{reduction.name}.npz"
    return cached(path, lambda: _predict(reduction, pictures, options))


def _predict(reduction: Reduction, pictures: str, options: Options) -> dict[str, np.ndarray]:
    run = Run(focus_run(options))
    model, task = td.load(run.best), run.task()
    decode = model.decode_config
    config, share = reduce_config(reduction, model.unwrap(merge=False), decode)
    model = td.load(run.best, reduce=config)
    samples = test_pairs(options) if pictures == "cutouts" else ((s, None) for s in squares())
    return predict_masks(model, task, samples) | {"share": np.array(share)}


def compute(question: tuple[Reduction, str], options: Options) -> None:
    """Predict the masks with one reduction on one set of pictures."""
    predict(*question, options)


def table(options: Options) -> list[dict[str, Any]]:
    """The rows: scores of each reduction method at each cost."""
    full = {pictures: predict(Reduction(), pictures, options) for pictures in PICTURES}
    covered = np.unpackbits(full["photographs"]["masks"], axis=1).mean(axis=1)
    rows = []
    for reduction in reductions(FAMILIES):
        found = {pictures: predict(reduction, pictures, options) for pictures in PICTURES}
        shared = {p: overlaps(found[p]["masks"], full[p]["masks"]) for p in PICTURES}
        shown = np.where(covered >= _SMALLEST, shared["photographs"], np.nan)
        by_photograph = shown.reshape(-1, SQUARES)
        by_photograph = by_photograph[~np.isnan(by_photograph).all(axis=1)]
        row: dict[str, Any] = {"method": reduction.family, "wanted": reduction.wanted}
        row["cost"] = float(found["cutouts"]["share"])
        row["IoU"] = over_pictures([shared["cutouts"]])
        row["IoU, photographs"] = over_pictures([np.nanmean(by_photograph, axis=1)])
        row["photographs"] = len(by_photograph)
        row |= score_intervals([found["cutouts"]["scores"]], [full["cutouts"]["scores"]])
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row as text."""
    reduces = row["method"] != "none"
    texts = [row[name].percent() if reduces else "-" for name in ("IoU", "IoU, photographs")]
    for name in ("s_measure", "mean_f"):
        difference = row[f"{name}, difference"].percent(sign=True)
        texts += [row[name].percent(), difference if reduces else "-"]
    return (row["method"], f"{100 * row['cost']:.0f} %", *texts)


def main(options: Options) -> None:
    """Convert the model, predict all masks, and write the table."""
    focus_run(options)
    questions = itertools.product(reductions(FAMILIES), PICTURES)
    in_processes(functools.partial(compute, options=options), questions, options)
    rows = table(options)
    result = {"measures": MEASURES, "rows": plain(rows)}
    write_table("dense", HEADER, [cells(row) for row in rows], result)
