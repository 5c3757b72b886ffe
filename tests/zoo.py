"""Backbones of every kind that is supported, small and with random weights."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from examples import perturbed
from torch import Tensor, nn

# Name in timm, arguments, and an image size that is not a square.
TIMM: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", {}, (64, 96)),
    "augreg": ("vit_small_patch32_224.augreg_in21k", {}, (96, 64)),
    "deit": ("deit_tiny_patch16_224", {}, (64, 96)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, (64, 96)),
    "deit3": ("deit3_small_patch16_224", {}, (96, 64)),
    "dino": ("vit_small_patch16_224.dino", {}, (64, 96)),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 5}, (56, 84)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 5}, (84, 56)),
    "mae": ("vit_base_patch16_224.mae", {"global_pool": "avg", "num_classes": 5}, (64, 96)),
    "clip": ("vit_base_patch32_clip_224", {}, (64, 96)),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 5}, (64, 96)),
    "siglip average": ("vit_base_patch16_siglip_gap_224", {"num_classes": 5}, (64, 96)),
    "eva": ("eva_giant_patch14_224", {"embed_dim": 96, "num_heads": 6}, (56, 84)),
    "eva02": ("eva02_tiny_patch14_224", {"num_classes": 5}, (56, 84)),
    "eva02 large": (
        "eva02_large_patch14_224",
        {"embed_dim": 96, "num_heads": 6, "num_classes": 5},
        (56, 84),
    ),
    "eva02 post-norm": (
        "eva02_enormous_patch14_clip_224",
        {"embed_dim": 96, "num_heads": 6, "num_classes": 5},
        (56, 84),
    ),
    "dinov3": ("vit_small_patch16_dinov3", {"num_classes": 5}, (64, 96)),
    "dinov3 swiglu": ("vit_small_plus_patch16_dinov3", {"num_classes": 5}, (64, 96)),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}, (64, 96)),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}, (64, 96)),
    "grouped queries": (
        "vit_small_patch16_dinov3",
        {"num_classes": 5, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
        (64, 96),
    ),
}
_HF_SIZES = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "hf vit": ("ViTForImageClassification", {"num_labels": 5}),
    "hf vit model": ("ViTModel", {}),
    "hf deit": ("DeiTForImageClassification", {"num_labels": 5}),
    "hf deit teacher": ("DeiTForImageClassificationWithTeacher", {"num_labels": 5}),
    "hf deit model": ("DeiTModel", {}),
    "hf dinov2": ("Dinov2ForImageClassification", {"num_labels": 5, "mlp_ratio": 2}),
    "hf dinov2 swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "hf dinov2 registers": (
        "Dinov2WithRegistersForImageClassification",
        {"num_labels": 5, "num_register_tokens": 4},
    ),
    "hf clip": ("CLIPVisionModel", {}),
    "hf clip classifier": (
        "CLIPForImageClassification",
        {"num_labels": 5, "vision_config": _HF_SIZES, "text_config": {"num_hidden_layers": 1}},
    ),
    "hf clip projection": ("CLIPVisionModelWithProjection", {"projection_dim": 24}),
}
EVERY = (*TIMM, *HUGGING_FACE)
KINDS = ("vit", "deit distilled", "dinov2 registers", "siglip", "eva02", "dinov3", "hf vit")


def backbone(name: str, *, square: bool = True, **kwargs: Any) -> tuple[nn.Module, tuple[int, int]]:
    """A model of two blocks and the image size that it runs at."""
    torch.manual_seed(0)
    if name in HUGGING_FACE:
        cls, settings = HUGGING_FACE[name]
        config = getattr(transformers, cls).config_class(**(_HF_SIZES | settings | kwargs))
        return perturbed(getattr(transformers, cls)(config), std=0.02), (64, 64 if square else 96)
    model, arguments, other = TIMM[name]
    patch = 14 if "patch14" in model else 32 if "patch32" in model else 16
    size = (70, 70) if patch == 14 else (64, 64)
    size = size if square else other
    vit = timm.create_model(model, img_size=size, depth=2, **(arguments | kwargs))
    return perturbed(vit, std=0.02), size


def own_output(vit: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the model itself: logits, or pooled features without a head."""
    if not type(vit).__module__.startswith("transformers."):
        return vit

    def run(images: Tensor) -> Tensor:
        dinov2 = type(vit).__name__.startswith("Dinov2")  # it resizes positions unasked
        out = vit(images) if dinov2 else vit(images, interpolate_pos_encoding=True)
        for field in ("logits", "image_embeds", "pooler_output"):
            if getattr(out, field, None) is not None:
                return getattr(out, field)
        return out.last_hidden_state[:, 0]

    return run
