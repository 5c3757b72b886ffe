"""Time of the reduction step alone, matching and merging, beside that of ToMe.

Each method removes --r tokens from random tokens of the model's shape, as many as reach the layer
if every layer before it removed --r, too. What attention computes for a method is there already:
keys, scores, the input of attention. All methods take turns.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import tokendial as td
from benchmarks.alternating import Runner, Spread, alternate, ratio
from benchmarks.models import METHODS, backbone
from benchmarks.options import add_model, comma_separated, options, parse_options
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report, Row
from tokendial.attention import ByProducts
from tokendial.checks import check_layers, check_layers_exist
from tokendial.reduce.base import Reducer
from tokendial.tokens import Tokens

STEPS = (
    "tome",
    "tome_similarity",
    "pitome",
    "prune_merge",
    "learnt_metric",
    "evit_r",
    "evit_shift",
)
"""Methods that remove a number of tokens between attention and FFN; ToMe is what they are compared
with."""
COLUMNS = (
    Column("layer", "layer"),
    Column("patches", "patches"),
    Column("method", "method"),
    Column("ms", "ms", "{:.2f} ({low:.2f} to {high:.2f})"),
    Column("of_tome", "of ToMe's time", "{:.2f} ({low:.2f} to {high:.2f})"),
)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("step", __doc__, repeats=50)
    add_model(parser)
    parser.add_argument("--methods", type=comma_separated(str), default=list(STEPS))
    parser.add_argument("--layers", type=comma_separated(int), default=[1, 12])
    parser.add_argument("--r", type=int, default=8, help="tokens that each layer removes")
    parser.add_argument("--batch", type=int, default=8)
    asked = parse_options(parser, arguments, batch=2, r=1)
    if wrong := [name for name in asked.methods if name not in STEPS]:
        raise ValueError(f"methods must be some of {', '.join(STEPS)}, got {wrong[0]}.")
    vit = backbone(asked.model, img_size=asked.img_size, device=asked.device)
    check_layers(asked.layers)
    check_layers_exist(asked.layers, len(vit.blocks))
    configs: dict[str, Any] = METHODS
    reducers = {
        name: td.wrap(vit, reduce=replace(configs[name], r=asked.r)).eval().reducer
        for name in dict.fromkeys(["tome", *asked.methods])
    }
    rows = []
    for layer in asked.layers:
        tokens, attended = random_tokens(vit, asked.batch, asked.r * (layer - 1), asked.device)
        runners = {
            name: Runner(partial(step, reducer, layer, asked.r, tokens, attended))
            for name, reducer in reducers.items()
        }
        turns = alternate(
            runners, repeats=asked.repeats, device=asked.device, seconds_per_round=0.01
        )
        patches = tokens.x.shape[1] - tokens.prefix
        for name, own in turns.items():
            time = Spread.of([1000 * turn.seconds for turn in own])
            row: Row = {"layer": layer, "patches": patches, "method": name}
            row["what"] = f"{name}, layer {layer}"
            rows.append(row | time.as_row("ms") | ratio(own, turns["tome"]).as_row("of_tome"))
    figure = bar_figure(rows, "what", {"ms": "ms", "of_tome": "of ToMe's time"})
    Report(f"step_{asked.model}", COLUMNS, rows, figure).write(asked)


def step(
    reducer: Reducer, layer: int, r: int, tokens: Tokens, attended: ByProducts
) -> Tokens | None:
    """Group the tokens and merge or drop them, as a block does between attention and FFN."""
    grouping = reducer.group(layer, r, tokens, attended)
    if grouping is None:
        return None
    return tokens.apply_grouping(grouping, track_size=reducer.tracks_size)


def random_tokens(
    vit: nn.Module, batch: int, removed: int, device: str
) -> tuple[Tokens, ByProducts]:
    """Random tokens of a ViT after layers that removed some, and what attention hands on of them.

    Args:
        vit: A timm model.
        batch: Images.
        removed: Patch tokens that earlier layers removed.
        device: Device of the tensors.

    Raises:
        ValueError: If fewer than two patch tokens are left.
    """
    grid, prefix = vit.patch_embed.grid_size, vit.num_prefix_tokens
    left = grid[0] * grid[1] - removed
    if left < 2:
        raise ValueError(f"r must leave 2 patch tokens for each of the layers, got {left}.")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, prefix + left, *shape, generator=generator).to(device)

    width = vit.embed_dim
    tokens = Tokens(draw(width), prefix=prefix, grid=grid, size=torch.ones_like(draw()))
    attended = ByProducts(
        mean_keys=draw(width // vit.blocks[0].attn.num_heads),
        class_attention=draw().softmax(-1),
        mean_attention=draw().softmax(-1),
        shift=draw().abs(),
        attention_input=draw(width),
    )
    return tokens, attended
