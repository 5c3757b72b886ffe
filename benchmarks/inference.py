"""Speed of methods and degrees compared with plain timm in the same mode, and with their cost.

For each model, dtype, mode and batch size, the first row is plain timm and the second is Tokendial
without reduction. All rows take turns and share one set of weights. Optimised models have weights
of their own, so as many of them take turns as fit into memory. Degrees are those whose costs are
nearest to --costs, or those of --degrees, which all methods must offer.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from torch import nn

import tokendial as td
from benchmarks.memory import free_bytes
from benchmarks.models import (
    METHODS,
    backbone,
    check_degrees,
    degrees_at,
    random_images,
    with_reduction,
)
from benchmarks.modes import MODES, at_degrees, plain
from benchmarks.options import DTYPES, add_model, comma_separated, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, compare

SETTINGS = ("model", "dtype", "mode", "batch")
COLUMNS = (
    *(Column(name, name) for name in SETTINGS),
    Column("method", "method"),
    Column("degree", "degree"),
    *MEASURES,
)


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    run("inference", __doc__, arguments, methods=["tome", "evit", "dyt", "dar"], costs=[0.75, 0.6])


def run(
    name: str, doc: str | None, arguments: list[str], *, methods: list[str], costs: list[float]
) -> None:
    """Run the command `name`, with `methods` and `costs` as defaults of its options."""
    parser = options(name, doc, repeats=5)
    add_model(parser)
    parser.add_argument("--methods", type=comma_separated(str), default=methods)
    parser.add_argument(
        "--costs", type=comma_separated(float), default=costs, help="costs as fractions of timm's"
    )
    parser.add_argument(
        "--degrees", type=comma_separated(int), help="degrees of the dial, instead of --costs"
    )
    parser.add_argument("--batch", type=comma_separated(int), default=[8])
    parser.add_argument("--dtype", type=comma_separated(str), default=["fp32"])
    parser.add_argument("--mode", type=comma_separated(str), default=["eager"])
    asked = parse_options(parser, arguments, batch=[2])
    for option, allowed in (("dtype", DTYPES), ("mode", MODES), ("methods", METHODS)):
        if wrong := [value for value in getattr(asked, option) if value not in allowed]:
            raise ValueError(f"{option} must be some of {', '.join(allowed)}, got {wrong[0]}.")
    rows = [row for model in asked.model.split(",") for row in _rows(model, asked)]
    file = f"{name}_{asked.model.replace(',', '_')}"
    Report(file, COLUMNS, rows, cost_figure(rows, SETTINGS)).write(asked)


def _rows(model: str, asked: argparse.Namespace) -> Iterator[Row]:
    for dtype in asked.dtype:
        vit = backbone(model, img_size=asked.img_size, device=asked.device, dtype=DTYPES[dtype])
        for mode, batch in itertools.product(asked.mode, asked.batch):
            settings = {"model": model, "dtype": dtype, "mode": mode, "batch": batch}
            for number, methods in enumerate(_groups(vit, mode, asked)):
                found = compare(
                    list(_contenders(vit, settings, methods, asked)),
                    batch=batch,
                    repeats=asked.repeats,
                    device=asked.device,
                )
                # Every group needs timm and the unreduced model; their rows are given once.
                yield from found if number == 0 else found[2:]
                torch.compiler.reset()


def _groups(vit: nn.Module, mode: str, asked: argparse.Namespace) -> Iterator[list[str]]:
    """Groups of methods that fit into memory: one group, unless each degree has its own weights."""
    together = len(asked.methods)
    if mode != "eager":
        weights = sum(weight.nbytes for weight in vit.parameters())
        graphs = free_bytes(asked.device) // 2 // weights - 2  # of timm and the whole model
        together = max(1, graphs // len(asked.degrees or asked.costs))
    for first in range(0, len(asked.methods), together):
        yield asked.methods[first : first + together]


def _contenders(
    vit: nn.Module, settings: Row, methods: list[str], asked: argparse.Namespace
) -> Iterator[Contender]:
    mode, images = settings["mode"], random_images(vit, settings["batch"])
    whole = td.wrap(vit).eval()
    labels = settings | {"method": "timm", "degree": 0}
    yield Contender(labels, whole.cost().gmacs, plain(vit, images, mode))
    models = {"none": whole} | {name: with_reduction(vit, name, images) for name in methods}
    for method, model in models.items():
        degrees = [0] if method == "none" else _degrees(method, model, asked)
        for degree, runner in zip(degrees, at_degrees(model, images, mode, degrees), strict=True):
            labels = settings | {"method": method, "degree": degree}
            yield Contender(labels, model.cost(degree).gmacs, runner)


def _degrees(method: str, model: td.DialViT, asked: argparse.Namespace) -> list[int]:
    if asked.degrees:
        check_degrees(method, model, asked.degrees)
    return asked.degrees or degrees_at(model, asked.costs)
