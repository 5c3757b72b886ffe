"""Speed of plain timm, of ToMe by its authors, by Pruna and by Tokendial, and of transformers' ViT.

All ToMe models have the same r. The authors' code is imported unchanged from a checkout of
facebookresearch/ToMe (--tome-checkout); its logits must equal those of Tokendial's ToMe. Pruna's
ToMe acts on a ViT of transformers. Each row is compared with plain timm in the same mode and, in
the last columns, with timm's fastest mode. The fastest mode of each peer is marked.
"""

import argparse
import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner, alternate, ratio, seconds
from benchmarks.models import backbone, random_images
from benchmarks.modes import MODES, at_degrees, plain
from benchmarks.options import DTYPES, add_model, comma_separated, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report, Row
from benchmarks.speed import MEASURES, Contender, speed_row
from tokendial.measure import count_macs

COLUMNS = (
    Column("method", "peer"),
    Column("mode", "mode"),
    *MEASURES,
    Column("best", "its best"),
    Column("over_best", "over timm's best", "{:.2f}x ({low:.2f} to {high:.2f})"),
)
TOLERANCE = 1e-4


def main(arguments: list[str]) -> None:
    """Compare, measure, and write the results."""
    parser = options("peers", __doc__, repeats=5)
    add_model(parser)
    parser.add_argument("--r", type=int, default=8, help="tokens that ToMe merges in each layer")
    parser.add_argument(
        "--tome-checkout", type=Path, help="folder of a checkout of facebookresearch/ToMe"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mode", type=comma_separated(str), default=list(MODES))
    asked = parse_options(parser, arguments, r=2, batch=2, mode=["eager"])
    if wrong := [mode for mode in asked.mode if mode not in MODES]:
        raise ValueError(f"mode must be some of {', '.join(MODES)}, got {wrong[0]}.")
    vit = backbone(asked.model, img_size=asked.img_size, device=asked.device)
    models, notes = peers(vit, asked)
    rows = measure(models, asked)
    figure = cost_figure(rows, ["mode"])
    Report(f"peers_{asked.model}", COLUMNS, rows, figure, notes).write(asked)


@torch.no_grad()
def peers(vit: nn.Module, asked: argparse.Namespace) -> tuple[dict[str, nn.Module], list[str]]:
    """The installed peers, and notes: the missing ones, and how far logits differ."""
    ours = td.wrap(vit, reduce=td.ToMe(r=asked.r)).eval()
    models, notes = {"timm": vit, "tokendial tome": ours}, []
    if asked.tome_checkout:
        theirs = models["authors' tome"] = authors_tome(asked.tome_checkout, vit, asked.r)
        images = random_images(vit, 2)
        apart = float((theirs(images) - ours(images)).abs().max())
        if not apart <= TOLERANCE:
            raise ValueError(f"the authors' ToMe gives other logits than ours: {apart:.1e} apart.")
        notes.append(f"logits of the authors' ToMe and of ours differ by {apart:.1e}")
    else:
        notes.append("authors' tome: no --tome-checkout")
    if find_spec("transformers"):
        models["transformers"] = TransformersViT(vit, asked.device)
    else:
        notes.append("transformers: not installed")
    if find_spec("pruna"):
        models["pruna's tome"] = pruna_tome(TransformersViT(vit, asked.device), asked.r)
    else:
        notes.append("pruna: not installed")
    return models, notes


def measure(models: dict[str, nn.Module], asked: argparse.Namespace) -> list[Row]:
    """One row per peer and mode."""
    image = torch.empty(1, 3, *models["timm"].patch_embed.img_size, device="meta")
    gmacs = {name: count_macs(each, lambda m: m(image)) / 1e9 for name, each in models.items()}
    for model in models.values():
        model.to(DTYPES[asked.dtype])
    images = random_images(models["timm"], asked.batch)
    contenders = {
        (name, mode): Contender(
            {"method": name, "mode": mode}, gmacs[name], _runner(model, images, mode)
        )
        for name, model in models.items()
        for mode in asked.mode
    }
    runners = {key: contender.runner for key, contender in contenders.items()}
    with torch.no_grad():
        turns = alternate(runners, repeats=asked.repeats, device=asked.device)
    best = {name: min(asked.mode, key=lambda mode: seconds(turns[name, mode])) for name in models}
    rows = []
    for (name, mode), contender in contenders.items():
        base = "timm", mode
        row = speed_row(
            (contender, turns[name, mode]),
            (contenders[base], turns[base]),
            batch=asked.batch,
            device=asked.device,
        )
        over = ratio(turns["timm", best["timm"]], turns[name, mode])
        mark = {"best": "*" if mode == best[name] else ""}
        rows.append(row | mark | over.as_row("over_best"))
    return rows


def _runner(model: nn.Module, images: Tensor, mode: str) -> Runner:
    if isinstance(model, td.DialViT):
        return next(at_degrees(model, images, mode, [model.degree]))
    return plain(model, images, mode)


def authors_tome(checkout: Path, vit: nn.Module, r: int) -> nn.Module:
    """Apply the authors' patch to a copy of `vit` that shares its weights.

    Raises:
        ValueError: If `checkout` does not hold their package.
    """
    if not (checkout / "tome" / "patch").is_dir():
        raise ValueError(f"tome_checkout must hold the folder tome/patch, got {checkout}.")
    sys.path.insert(0, str(checkout))
    try:
        from tome.patch import timm as patch
    finally:
        sys.path.remove(str(checkout))
    model = copy.deepcopy(vit, memo={id(weight): weight for weight in vit.parameters()})
    patch(model)
    model.r = r
    return model


def pruna_tome(model: "TransformersViT", r: int) -> nn.Module:
    """Apply Pruna's token merging to a model of transformers."""
    from pruna import SmashConfig, smash

    config = SmashConfig({"token_merging": {"r": r}}, device=model.model.device.type)
    model.model = smash(model.model, config).model
    return model


class TransformersViT(nn.Module):
    """A ViT of transformers with the sizes of a timm model and random weights of its own."""

    def __init__(self, vit: nn.Module, device: str) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        block = vit.blocks[0]
        self.model = ViTForImageClassification(
            ViTConfig(
                hidden_size=vit.embed_dim,
                num_hidden_layers=len(vit.blocks),
                num_attention_heads=block.attn.num_heads,
                intermediate_size=block.mlp.fc1.out_features,
                image_size=vit.patch_embed.img_size,
                patch_size=vit.patch_embed.patch_size,
                num_labels=vit.num_classes,
            )
        )
        self.to(device).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images).logits
