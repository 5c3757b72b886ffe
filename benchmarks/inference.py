"""Speed of every method and degree over plain timm in the same mode, beside what they save.

The first row of each model, dtype, mode and batch size is plain timm, the second one Tokendial
without a reduction. All share one set of weights and take turns. Degrees are those whose cost is
nearest to --costs, or --degrees, which all methods have to offer.
"""

import argparse
from collections.abc import Iterator

from torch import nn

import tokendial as td
from benchmarks.alternating import Runner
from benchmarks.models import (
    METHODS,
    backbone,
    check_degrees,
    degrees_at,
    gmacs,
    random_images,
    reduced,
)
from benchmarks.options import DTYPES, add_model, listed, options, parsed
from benchmarks.plots import against_cost
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, compare

MODES = ("eager",)
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
    """The command `name`, which looks at `methods` at `costs` unless it is told others."""
    parser = options(name, doc, repeats=5)
    add_model(parser)
    parser.add_argument("--methods", type=listed(str), default=methods)
    parser.add_argument("--costs", type=listed(float), default=costs, help="shares of timm's")
    parser.add_argument("--degrees", type=listed(int), help="of the dial, instead of --costs")
    parser.add_argument("--batch", type=listed(int), default=[8])
    parser.add_argument("--dtype", type=listed(str), default=["fp32"])
    parser.add_argument("--mode", type=listed(str), default=list(MODES))
    asked = parsed(parser, arguments, batch=[2])
    for option, allowed in (("dtype", DTYPES), ("mode", MODES), ("methods", METHODS)):
        if wrong := [value for value in getattr(asked, option) if value not in allowed]:
            raise ValueError(f"{option} must be some of {', '.join(allowed)}, got {wrong[0]}.")
    rows = [row for model in asked.model.split(",") for row in _rows(model, asked)]
    file = f"{name}_{asked.model.replace(',', '_')}"
    Report(file, COLUMNS, rows, against_cost(rows, SETTINGS)).write(asked)


def _rows(model: str, asked: argparse.Namespace) -> Iterator[Row]:
    for dtype in asked.dtype:
        vit = backbone(model, img_size=asked.img_size, device=asked.device, dtype=DTYPES[dtype])
        for mode in asked.mode:
            for batch in asked.batch:
                settings = {"model": model, "dtype": dtype, "mode": mode, "batch": batch}
                contenders = list(_contenders(vit, settings, asked))
                yield from compare(
                    contenders, batch=batch, repeats=asked.repeats, device=asked.device
                )


def _contenders(vit: nn.Module, settings: Row, asked: argparse.Namespace) -> Iterator[Contender]:
    images = random_images(vit, settings["batch"])
    whole = td.wrap(vit).eval()
    for method, model in (("timm", vit), ("none", whole)):
        labels = settings | {"method": method, "degree": 0}
        yield Contender(labels, gmacs(whole), Runner(lambda model=model: model(images)))
    for method in asked.methods:
        model = reduced(vit, method, images)
        if asked.degrees:
            check_degrees(method, model, asked.degrees)
        for degree in asked.degrees or degrees_at(model, asked.costs):
            runner = Runner(
                lambda model=model: model(images), lambda m=model, d=degree: m.set_degree(d)
            )
            labels = settings | {"method": method, "degree": degree}
            yield Contender(labels, gmacs(model, degree), runner)
