"""Test inputs: tiny models, golden cases, one example of every method."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tokendial as td

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 7,
}
# Every registered method needs an example here; the conformance tests run on each of them.
REDUCERS = {
    "tome": td.ToMe(r=8),
    "evit": td.EViT(keep_rate=0.6, layers=(2, 4)),
    "dynamicvit": td.DynamicViT(keep_rate=0.6, layers=(2, 4)),
    "dyt": td.DyT(target_ratio=0.5),
    "dar": td.DAR(target_ratio=0.5),
    "ffn_merge": td.FFNMerge(r=16),
    "pitome": td.PiToMe(r=8),
    "prune_merge": td.PruneMerge(r=8),
    "pyra": td.PYRA(r=8),
    "learnt_metric": td.LearntMetric(r=8, dim=8),
    "stack": td.Stack(methods=[td.ToMe(r=8), td.FFNMerge(r=8)]),
    # Windows have to divide every grid that the tests use; test_in_windows.py has more of them.
    "in_windows": td.InWindows(reduce=td.ToMe(r=8), windows=(1, 1)),
    "frame_by_frame": td.FrameByFrame(reduce=td.ToMe(r=8)),
}
ADAPTERS = {
    "dense_adapter": td.DenseAdapter(dim=6, start=4, interval=3),
    "adaptformer": td.AdaptFormer(dim=6, scale=0.5),
    "dense_adapter_wide": td.DenseAdapter(
        dim=6, start=3, interval=3, fusion="output", channel_scale=True
    ),
    "adaptformer_experts": td.AdaptFormer(dim=4, experts=3),
    "dar": td.DARAdapter(dims=(6, 4)),
    "houlsby": td.Houlsby(dim=6),
    "vpt": td.VPT(prompts=3),
    "vpt_shallow": td.VPT(prompts=3, deep=False),
    "ssf": td.SSF(),
    "released_dense_adapter": td.ReleasedDenseAdapter(dims=(6, 4)),
    "combined": td.Combined(methods=[td.LoRA(rank=2), td.AdaptFormer(dim=6)]),
    "res_tuning": td.ResTuning(dim=6),
    "synqt": td.SynQT(queries=2, dim=6, attention_dim=3),
    "noah": td.NOAH(prompts=[2, 0, 3, 0], rank=[0, 2, 0, 1], dim=[3, 0, 1, 0]),
    "noah_supernet": td.NOAHSupernet(prompts=(2, 3), rank=(1, 2), dim=(2, 4), depths=(4,)),
    "fact": td.FacT(rank=3),
    "fact_tk": td.FacT(rank=3, kind="tk"),
    "convpass": td.ConvPass(dim=4),
    "bitfit": td.BitFit(),
    "last_blocks": td.LastBlocks(blocks=2),
    "lora": td.LoRA(rank=2),
    "peft": td.PEFT(method="loha", options={"r": 2}),
    "linear": td.LinearProbe(),
    "full": td.FullFineTuning(),
}
# Adapters that need a model whose head reads the class token alone.
FOR_THE_CLASS_TOKEN = {"synqt"}
# Adapters that need the complete token grid, and reducers that do not keep it.
ON_THE_GRID = {"dar", "convpass"}
AS_TOME = {
    "stack",
    "frame_by_frame",
    "in_windows",
    "pitome",
    "prune_merge",
    "learnt_metric",
    "pyra",
}
SHRINKING = {"tome", "evit", "dynamicvit"} | AS_TOME
PAIRS = {
    f"{reduce}-{adapt}": (REDUCERS[reduce], ADAPTERS[adapt])
    for reduce in REDUCERS
    for adapt in ADAPTERS
    if not (adapt in ON_THE_GRID and reduce in SHRINKING)
    # FrameByFrame, InWindows and Stack only call other methods, and the rest of them reduce where
    # ToMe does: adapters see no difference.
    and (reduce not in AS_TOME or adapt == "dense_adapter")
}


def tiny_vit(**kwargs: Any) -> nn.Module:
    """A ViT of four blocks whose weights, head included, are all away from zero."""
    torch.manual_seed(0)
    return perturbed(timm.create_model("vit_tiny_patch16_224", **(TINY | kwargs)))


def perturbed(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Add noise to every parameter: fresh heads and adapters are zero and would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    """Normalised images."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    path = GOLDEN / f"{case}.safetensors"
    return meta, load_file(path) if path.exists() else {}


def split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def replay_noise(monkeypatch: Any, noise: Tensor) -> None:
    """Replace the noise of DyT and DAR by recorded noise [B, depth, L, 1], layer by layer."""
    layers = iter(noise.squeeze(-1).unbind(1))
    monkeypatch.setattr("tokendial.reduce.select.logistic_noise", lambda like: next(layers))


def golden_vit(case: str) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """Return description and tensors of a golden case, and the timm model with its weights."""
    meta, tensors = golden(case)
    vit = timm.create_model("vit_tiny_patch16_224", **meta["settings"]["model"])
    vit.load_state_dict(split(tensors, "weight."))
    return meta, tensors, vit.eval()
