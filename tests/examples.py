"""What tests work on: tiny models, golden cases, one example of every method."""

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
}
ADAPTERS = {
    "dense_adapter": td.DenseAdapter(dim=6, start=4, interval=3),
    "adaptformer": td.AdaptFormer(dim=6, scale=0.5),
    "lora": td.LoRA(rank=2),
    "linear": td.Linear(),
    "full": td.Full(),
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


def golden_vit(case: str) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """A golden case and the timm model with its weights."""
    meta, tensors = golden(case)
    vit = timm.create_model("vit_tiny_patch16_224", **meta["settings"]["model"])
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    vit.load_state_dict(weights)
    return meta, tensors, vit.eval()
