"""Growth of time and memory with the image size, compared with the growth of the cost.

At each size, every method runs at the degree whose cost is nearest to the same fraction of timm's.
The memory of the reduction is its peak in any layer (similarities, indices, merged tokens), above
what the model has allocated at that point. The memory of activations is the peak of a whole pass of
plain timm. All methods and sizes take turns.
"""

import argparse
from collections.abc import Iterator

import torch

import tokendial as td
from benchmarks.alternating import Runner, alternate, ratio
from benchmarks.memory import mark_reduction, peak_of
from benchmarks.models import backbone, degrees_at, random_images, with_reduction
from benchmarks.options import comma_separated, options, parse_options
from benchmarks.plots import growth_figure
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, speed_row

COLUMNS = (
    Column("method", "method"),
    Column("img_size", "pixels"),
    Column("degree", "degree"),
    *MEASURES,
    Column("time_growth", "time grows", "{:.2f}x ({low:.2f} to {high:.2f})"),
    Column("mac_growth", "cost grows", "{:.2f}x"),
    Column("growth_quotient", "cost / time", "{:.2f}"),
    Column("reducing_mib", "reduction MiB", "{:.2f}"),
    Column("reducing_share", "of activations", "{:.1%}"),
)


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("resolution", __doc__, repeats=3)
    parser.add_argument("--model", default="vit_small_patch16_224", help="name of a timm model")
    parser.add_argument(
        "--sizes", type=comma_separated(int), default=[224, 448, 896], help="image sizes in pixels"
    )
    parser.add_argument("--methods", type=comma_separated(str), default=["tome", "evit", "dar"])
    parser.add_argument("--cost", type=float, default=0.65, help="cost as a fraction of timm's")
    parser.add_argument("--batch", type=int, default=1)
    asked = parse_options(parser, arguments, sizes=[64, 96])
    rows = measure(asked)
    measures = {"time_growth": "time", "mac_growth": "multiply-accumulates"}
    figure = growth_figure(rows, measures, "img_size")
    Report(f"resolution_{asked.model}", COLUMNS, rows, figure).write(asked)


def measure(asked: argparse.Namespace) -> list[Row]:
    """One row per method and size."""
    models: dict[tuple[str, int], tuple[Contender, td.DialViT]] = {}
    for size in asked.sizes:
        for contender, model in _contenders(size, asked):
            models[contender.labels["method"], size] = contender, model
    runners = {key: contender.runner for key, (contender, _) in models.items()}
    with torch.no_grad():
        turns = alternate(runners, repeats=asked.repeats, device=asked.device)
    rows = []
    activations = 0.0
    for (method, size), (contender, model) in models.items():
        base, first = ("timm", size), (method, asked.sizes[0])
        row = speed_row(
            (contender, turns[method, size]),
            (models[base][0], turns[base]),
            batch=asked.batch,
            device=asked.device,
        )
        activations = row["peak_mib"] if method == "timm" else activations
        time = ratio(turns[method, size], turns[first])
        cost = contender.gmacs / models[first][0].gmacs
        with torch.no_grad(), mark_reduction(model):
            reducing = peak_of(contender.runner.call, asked.device).reducing / 2**20
        row |= {
            **time.as_row("time_growth"),
            "mac_growth": cost,
            "growth_quotient": cost / time.median,
            "reducing_mib": reducing,
            "reducing_share": reducing / activations,
        }
        rows.append(row)
    return rows


def _contenders(size: int, asked: argparse.Namespace) -> Iterator[tuple[Contender, td.DialViT]]:
    """Plain timm and the methods at one size, each with the wrapped model of its reducer."""
    vit = backbone(asked.model, img_size=size, device=asked.device)
    images = random_images(vit, asked.batch)
    labels = {"img_size": size, "degree": 0}
    whole = td.wrap(vit).eval()
    plain = Contender({"method": "timm"} | labels, whole.cost().gmacs, Runner(lambda: vit(images)))
    yield plain, whole
    for method in asked.methods:
        model = with_reduction(vit, method, images)
        (degree,) = degrees_at(model, [asked.cost])
        model.set_degree(degree)
        labels = {"method": method, "img_size": size, "degree": degree}
        runner = Runner(lambda model=model: model(images))
        yield Contender(labels, model.cost().gmacs, runner), model
