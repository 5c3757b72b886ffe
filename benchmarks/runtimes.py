"""Speed of ToMe in PyTorch, onnxruntime and OpenVINO, and with a run: what precision costs.

The first row is plain timm in float32, as PyTorch runs it by itself; "speed" and "cost" are
compared with it. "of degree 0" is the speed of a row over that of the same runtime at degree 0.
With --run, the balanced accuracy of a run on its test images follows. Each row is compared with
PyTorch in float32 at the same degree: the difference with a paired 95 % interval, the share of
images whose answer changed, and the share of the decisions about tokens that changed, which are
merges and drops (see merges.py).
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner
from benchmarks.evidence_real.statistics import balanced_accuracy, interval, resampled_scores
from benchmarks.merges import changed_decisions, origins
from benchmarks.models import backbone, random_images
from benchmarks.options import add_model, comma_separated, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, compare
from tokendial.measure import Resampling
from tokendial.runs import Run
from tokendial.runs.evaluate import validation_set
from tokendial.runs.training_images import calibration_images

RUNTIMES = (
    td.Runtime(),
    td.Runtime(optimize=True),
    td.Runtime(precision="bf16"),
    td.Runtime("onnxruntime"),
    td.Runtime("onnxruntime", "int8"),
    td.Runtime("openvino"),
    td.Runtime("openvino", "bf16"),
    td.Runtime("openvino", "int8"),
)
COLUMNS = (
    Column("method", "method"),
    Column("degree", "degree"),
    *MEASURES[:-2],
    Column("of_degree_0", "of degree 0", "{:.2f}x"),
)
SCORES = (
    Column("method", "method"),
    Column("degree", "degree"),
    Column("cost", "cost", "{:.0%}"),
    Column("score", "balanced accuracy"),
    Column("difference", "minus PyTorch, fp32"),
    Column("changed", "changed answers", "{:.1%}"),
    Column("decisions", "changed merges", "{:.1%}"),
)


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("runtimes", __doc__, repeats=9)
    add_model(parser, default="vit_small_patch16_224")
    parser.add_argument("--degrees", type=comma_separated(int), default=[0, 8, 13])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--run", type=Path, help="folder of a run on images with classes")
    parser.add_argument(
        "--tome", type=int, metavar="R", help="with --run: ToMe in place of the run's reduction"
    )
    parser.add_argument(
        "--images", type=int, help="with --run: so many random test images; by default all"
    )
    asked = parse_options(parser, arguments, degrees=[0, 2], batch=2)
    if asked.run:
        with tempfile.TemporaryDirectory() as folder:
            reduce = None if asked.tome is None else td.ToMe(r=asked.tome)
            rows = scores(Run(asked.run), asked.degrees, Path(folder), reduce, asked.images)
        Report("runtimes_scores", SCORES, rows, _score_figure(rows)).write(asked)
        return
    vit = backbone(asked.model, img_size=asked.img_size, device="cpu")
    images = random_images(vit, asked.batch)
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(_contenders(vit, images, asked.degrees, Path(folder)))
        rows = compare(contenders, batch=asked.batch, repeats=asked.repeats, device="cpu")
    for row in rows:
        first = next(each for each in rows if each["method"] == row["method"])
        pairs = zip(first["seconds"], row["seconds"], strict=True)
        row["of_degree_0"] = float(np.median([base / own for base, own in pairs]))
    name = f"runtimes_{asked.model}_batch{asked.batch}"
    Report(name, COLUMNS, rows, cost_figure(rows, ())).write(asked)


def _contenders(
    vit: nn.Module, images: Tensor, degrees: Sequence[int], folder: Path
) -> Iterator[Contender]:
    model = td.wrap(vit, reduce=td.ToMe(r=max(degrees))).eval()
    plain = Runner(partial(vit, images), seen=False)
    yield Contender({"method": "timm, fp32", "degree": 0}, model.cost(0).gmacs, plain)
    for runtime in RUNTIMES:
        started = runtime.start(model, images, degrees=degrees, folder=folder)
        for degree in degrees:
            runner = Runner(
                partial(started, images), partial(started.set_degree, degree), seen=False
            )
            labels = {"method": _title(runtime), "degree": degree}
            yield Contender(labels, model.cost(degree).gmacs, runner)


def _title(runtime: td.Runtime) -> str:
    optimized = ", optimised" if runtime.optimize else ""
    return f"{runtime.name}, {runtime.precision}{optimized}"


@torch.no_grad()
def scores(
    run: Run,
    degrees: Sequence[int],
    folder: Path,
    reduce: td.ReducerConfig | None = None,
    count: int | None = None,
) -> list[Row]:
    """Balanced accuracy of a run in each runtime and precision, paired with PyTorch in float32.

    Args:
        run: A run on images with classes.
        degrees: Degrees to compare.
        folder: An empty folder for files that give the tokens of each patch.
        reduce: Reduction method in place of the run's own one; None keeps that.
        count: Number of random test images; None: all.
    """
    model = run.model(reduce)
    _, loader = validation_set(run, model, 32)
    images, targets = map(torch.cat, zip(*loader, strict=True))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    images, labels = images[chosen], targets[chosen].numpy()
    batches = images.split(32)
    # Files of another reduction would replace those that the run keeps.
    kept = folder / "runtime" if reduce else run.runtime_folder
    draws = Resampling(len(labels), 1)
    rows: list[Row] = []
    known: dict[int, tuple[np.ndarray, np.ndarray, Tensor]] = {}
    calibration = partial(calibration_images, run)
    for runtime in RUNTIMES:
        if runtime.optimize:
            continue  # the same numbers as the plain model's, up to rounding
        started = runtime.start(
            model,
            batches[0],
            degrees=degrees,
            folder=kept,
            calibration=calibration,
        )
        for degree in degrees:
            started.set_degree(degree)
            model.set_degree(degree)
            held = origins(model, images, runtime, folder, calibration)
            logits = torch.cat([started(batch).float() for batch in batches]).numpy()
            found = resampled_scores(draws, balanced_accuracy, [logits], labels)
            base_logits, base, base_held = known.setdefault(degree, (logits, found, held))
            row: dict[str, Any] = {"method": _title(runtime), "degree": degree}
            row["cost"] = model.cost(degree).macs / model.cost(0).macs
            row["accuracy"] = float(found[0])
            row["score"] = interval(found).percent()
            row["difference"] = interval(found - base).percent(sign=True)
            row["changed"] = float((logits.argmax(1) != base_logits.argmax(1)).mean())
            row["decisions"] = changed_decisions(held, base_held) if degree else None
            rows.append(row)
    return rows


def _score_figure(rows: Sequence[Row]) -> Figure:
    """Balanced accuracy over cost, a line for each runtime and precision."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        costs, values = [row["cost"] for row in own], [row["accuracy"] for row in own]
        axis.plot(costs, values, marker="o", label=method)
    values = [row["accuracy"] for row in rows]
    axis.set(
        xlabel="cost, as a share of degree 0",
        ylabel="balanced accuracy",
        # Differences smaller than the intervals must not look large.
        ylim=(min(values) - 0.05, max(values) + 0.05),
    )
    axis.legend(loc="lower right", fontsize="small")
    return figure
