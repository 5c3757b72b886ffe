"""Time to change the degree while a compensator is merged into the weights.

Each round sets another degree, chosen at random, and runs one image at it. Multiply-accumulates are
counted with and without the compensator.
"""

import random

import torch

import tokendial as td
from benchmarks.alternating import Runner, Spread, alternate, ratio
from benchmarks.models import backbone, random_images
from benchmarks.options import add_model, options, parse_options
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report

COLUMNS = (
    Column("what", "what"),
    Column("ms", "ms", "{:.2f} ({low:.2f} to {high:.2f})"),
    Column("slowest_ms", "slowest ms", "{:.2f}"),
    Column("share", "of a forward pass", "{:.3f} ({low:.3f} to {high:.3f})"),
)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("dial", __doc__, repeats=100)
    add_model(parser, default="deit_base_patch16_224")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rank", type=int, default=2)
    asked = parse_options(parser, arguments, steps=4)
    vit = backbone(asked.model, img_size=asked.img_size, device=asked.device)
    model = td.wrap(vit, reduce=td.ToMe(r=asked.steps)).eval()
    ends = (0, asked.steps)
    macs = [model.cost(degree).macs for degree in ends]
    plugin = td.Compensator.for_model(model, td.ToCom(rank=asked.rank)).to(asked.device)
    plugin.attach(model)
    extra = max(model.cost(degree).macs - n for degree, n in zip(ends, macs, strict=True))
    image = random_images(vit, 1)
    draw = random.Random(0)

    def turn() -> None:
        model.set_degree(draw.choice([d for d in range(asked.steps + 1) if d != model.degree]))

    runners = {"turn": Runner(turn), "forward pass of one image": Runner(lambda: model(image))}
    turns = alternate(runners, repeats=asked.repeats, device=asked.device, seconds_per_round=0)
    rows = []
    for what, own in turns.items():
        ms = [1000 * each.seconds for each in own]
        time, share = Spread.of(ms), ratio(own, turns["forward pass of one image"])
        row = {"what": what, "slowest_ms": max(ms), "extra_macs": extra}
        rows.append(row | time.as_row("ms") | share.as_row("share"))
    notes = [f"the compensator adds {extra} multiply-accumulates"]
    figure = bar_figure(rows, "what", {"ms": "ms", "share": "of a forward pass"})
    Report(f"dial_{asked.model}", COLUMNS, rows, figure, notes).write(asked)
