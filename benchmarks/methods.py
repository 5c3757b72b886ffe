"""Speed of every reduction method over plain timm at equal cost, side by side in one run.

    python benchmarks/methods.py --gmacs 12.3 --batch 8

Each method is turned to the degree whose cost is nearest to the one that is asked for. Weights are
random; the dispatchers of DyT and DAR are centred first, so that they select the share of tokens
that they would be trained to. Results go to benchmarks/results/methods_MODEL_HARDWARE_DATE.json.
"""

import argparse

import timm
import torch
from speed import hardware, measure, write_result
from torch import Tensor, nn

import tokendial as td
from tokendial.reduce.base import ReducerConfig

METHODS: dict[str, ReducerConfig] = {
    "ToMe": td.ToMe(),
    "ToMe, random": td.ToMe(matching="random"),
    "ToMe, stride 4": td.ToMe(stride=4),
    "EViT, merge": td.EViT(),
    "EViT, drop": td.EViT(rest="drop"),
    "EViT, r per layer": td.EViT(r=8),
    "DynamicViT": td.DynamicViT(),
    "DyT, top-k": td.DyT(selection="topk"),
    "DyT, threshold": td.DyT(),
    "DAR, top-k": td.DAR(selection="topk"),
    "DAR, threshold": td.DAR(),
    "FFNMerge": td.FFNMerge(r=98),
}


def at_cost(model: td.DialViT, gmacs: float) -> None:
    """Turn the dial to the degree whose cost is nearest to `gmacs`."""
    model.set_degree(min(model.degrees, key=lambda n: abs(model.cost(n).gmacs - gmacs)))


@torch.no_grad()
def centre(model: td.DialViT, images: Tensor) -> None:
    """Shift the dispatchers of DyT or DAR so that each selects half of the tokens of `images`."""
    reducer = model.reducer
    logits = reducer.logits

    def centred(layer: int, tokens: td.tokens.Tokens) -> Tensor:
        found = logits(layer, tokens)
        reducer.dispatchers[layer - 1].bias -= found.median()
        return found - found.median()

    reducer.logits = centred
    model(images)
    del reducer.logits


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--gmacs", type=float, default=12.3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    vit = timm.create_model(options.model).eval().to(options.device)
    shape = (options.batch, 3, *vit.patch_embed.img_size)
    images = torch.randn(shape, device=options.device)
    models: dict[str, nn.Module] = {"timm": vit}
    costs = {"timm": td.wrap(vit).cost().gmacs}
    for name, config in METHODS.items():
        models[name] = model = td.wrap(vit, reduce=config).eval().to(options.device)
        at_cost(model, options.gmacs)
        if "threshold" in name:
            centre(model, images)
        costs[name] = model.cost().gmacs
    rows = measure(models, images, options.repeats)
    print(f"{options.model}, batch {options.batch}, {hardware(options.device)}")
    print("| method | degree | GMACs | cost ratio | speed over timm |\n|---|---|---|---|---|")
    for name, row in rows.items():
        row["gmacs"], row["degree"] = costs[name], getattr(models[name], "degree", 0)
        cheaper = costs["timm"] / costs[name]
        print(
            f"| {name} | {row['degree']} | {costs[name]:.2f} | {cheaper:.2f}x | "
            f"{row['speedup']:.2f}x |"
        )
    write_result(f"methods_{options.model}", options.device, options.batch, {"fp32": rows})


if __name__ == "__main__":
    main()
