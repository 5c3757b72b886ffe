"""Speed of whole models that hold a ViT, untouched and with an attached dial.

CLIP's image tower, DINOv2-S and Depth Anything (small) with random weights, at about 70 and 50 % of
the cost of their ViT. Each row is compared with the untouched model, end to end; "cost" is what the
multiply-accumulates of the whole model promise.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner
from benchmarks.evidence_real.matched_costs import nearest
from benchmarks.options import DTYPES, comma_separated, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, compare

COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("tower", "cost of the ViT", "{:.0%}"),
    *MEASURES,
)
SHARES = (0.7, 0.5)
"""Wanted costs of the ViT, as shares of its cost at degree 0."""


@dataclass(frozen=True)
class Case:
    """A model that is timed."""

    build: Callable[[bool], nn.Module]
    """Makes the model; a small one if asked to."""
    batch: int
    """Images in a batch."""
    side: int
    """Side of the images in pixels."""


def _clip(quick: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    layers = 2 if quick else 12
    config = CLIPVisionConfig(
        image_size=112 if quick else 224, patch_size=16, hidden_size=768,
        intermediate_size=3072, num_attention_heads=12,
        num_hidden_layers=layers,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def _dinov2_config(side: int, quick: bool, **settings: Any) -> Any:
    from transformers import Dinov2Config

    layers = 4 if quick else 12
    return Dinov2Config(
        image_size=side, patch_size=14, hidden_size=384, num_attention_heads=6,
        num_hidden_layers=layers, **settings,
    )  # fmt: skip


def _dinov2(quick: bool) -> nn.Module:
    from transformers import Dinov2Model

    return Dinov2Model(_dinov2_config(112 if quick else 224, quick))


def _depth_anything(quick: bool) -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    stages = [1, 2, 3, 4] if quick else [3, 6, 9, 12]
    backbone = _dinov2_config(
        259 if quick else 518,
        quick,
        out_features=[f"stage{stage}" for stage in stages],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=384,
            neck_hidden_sizes=[48, 96, 192, 384],
            fusion_hidden_size=64,
        )
    )


CASES = {
    "CLIP ViT-B/16": Case(_clip, 8, 224),
    "DINOv2-S": Case(_dinov2, 8, 224),
    "Depth Anything S": Case(_depth_anything, 1, 518),
}


def main(arguments: list[str]) -> None:
    """Time each model in turns with its degrees, and write the results."""
    parser = options("attach", __doc__, repeats=9, quick="one round of models of few layers")
    parser.add_argument("--models", type=comma_separated(str), default=list(CASES))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    asked = parse_options(parser, arguments)
    if unknown := [name for name in asked.models if name not in CASES]:
        raise ValueError(f"models must be some of {', '.join(CASES)}, got {unknown[0]}.")
    rows: list[Row] = []
    for name in asked.models:
        case = CASES[name]
        model = case.build(asked.quick).to(asked.device, DTYPES[asked.dtype]).eval()
        side = case.side // 2 if asked.quick else case.side
        images = torch.randn(case.batch, 3, side, side)
        images = images.to(asked.device, DTYPES[asked.dtype])
        settings = contenders(name, model, images)
        rows += compare(settings, batch=case.batch, repeats=asked.repeats, device=asked.device)
    Report("attach", COLUMNS, rows, cost_figure(rows, ["model"])).write(asked)


def contenders(name: str, model: nn.Module, images: Tensor) -> list[Contender]:
    """The untouched model, and the model at the degrees nearest to `SHARES`."""
    dial = td.attach(model, td.ToMe(r=0))
    whole = dial.cost(0).macs
    shares = functools.cache(lambda degree: dial.cost(degree).macs / whole)
    degrees = [nearest(shares, len(dial.degrees), wanted) for wanted in SHARES]
    gmacs = {degree: dial.cost_of_call(images[:1], degree=degree) / 1e9 for degree in (0, *degrees)}
    dial.detach()
    call = partial(model, images)
    untouched = Contender(
        {"model": name, "method": "untouched", "tower": 1.0},
        gmacs[0],
        Runner(call, partial(_detach, model)),
    )
    found = [untouched]
    for degree in degrees:
        labels = {"model": name, "method": f"ToMe r={degree}", "tower": shares(degree)}
        runner = Runner(call, partial(_attach, model, degree))
        found.append(Contender(labels, gmacs[degree], runner))
    return found


def _detach(model: nn.Module) -> None:
    """Make the model as it was, if it has a dial."""
    try:
        dial = td.attached(model)
    except ValueError:
        return
    dial.detach()


def _attach(model: nn.Module, degree: int) -> None:
    """Give the model a dial at a degree."""
    _detach(model)
    td.attach(model, td.ToMe(r=degree))
