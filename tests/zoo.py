"""Backbones of every kind that is supported, small and with random weights."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from examples import perturbed
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

_NAFLEX = {"embed_dim": 96, "num_heads": 6, "num_classes": 5}
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
    "naflex": ("naflexvit_base_patch16_gap", _NAFLEX, (64, 96)),
    "naflex map": (
        "naflexvit_so150m2_patch16_reg1_map",
        _NAFLEX | {"init_values": 1.0},
        (64, 96),
    ),
    "naflex factorized": ("naflexvit_base_patch16_parfac_gap", _NAFLEX, (64, 96)),
    "naflex vit": ("vit_tiny_patch16_224", {"use_naflex": True}, (64, 96)),
    "naflex dinov3": (
        "vit_small_patch16_dinov3",
        {"use_naflex": True, "num_classes": 5},
        (64, 96),
    ),
    "naflex rope mixed": (
        "vit_small_patch16_rope_mixed_224",
        {"use_naflex": True, "num_classes": 5},
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
_TORCHVISION_SIZES = {
    "image_size": 64,
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 96,
    "num_classes": 5,
}
_YOLOS = {
    "image_size": [64, 64],
    "num_detection_tokens": 5,
    "use_mid_position_embeddings": False,
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
    "hf dinov2 backbone": ("Dinov2Backbone", {"reshape_hidden_states": False}),
    "hf dinov2 registers backbone": (
        "Dinov2WithRegistersBackbone",
        {"reshape_hidden_states": False, "num_register_tokens": 2},
    ),
    "hf dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4}),
    "hf dinov3 gated": ("DINOv3ViTModel", {"use_gated_mlp": True, "num_register_tokens": 1}),
    "hf dinov3 backbone": ("DINOv3ViTBackbone", {"return_class_token": True}),
    "hf siglip": ("SiglipVisionModel", {}),
    "hf siglip headless": ("SiglipVisionModel", {"vision_use_head": False}),
    "hf siglip classifier": (
        "SiglipForImageClassification",
        {"num_labels": 5, "vision_config": _HF_SIZES, "text_config": {"num_hidden_layers": 1}},
    ),
    "hf siglip2": ("Siglip2VisionModel", {"num_patches": 16}),
    "hf siglip2 classifier": (
        "Siglip2ForImageClassification",
        {
            "num_labels": 5,
            "vision_config": _HF_SIZES | {"num_patches": 16},
            "text_config": {"num_hidden_layers": 1},
        },
    ),
    "hf mae": ("ViTMAEModel", {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}),
    "hf ijepa": ("IJepaModel", {}),
    "hf ijepa classifier": ("IJepaForImageClassification", {"num_labels": 5}),
    "hf vitpose": ("VitPoseBackbone", {"image_size": [64, 64], "patch_size": [16, 16]}),
    "hf owlvit": ("OwlViTVisionModel", {}),
    "hf owlv2": ("Owlv2VisionModel", {}),
    "hf yolos": ("YolosModel", _YOLOS),
    "hf yolos mid positions": ("YolosModel", _YOLOS | {"use_mid_position_embeddings": True}),
}
TORCHVISION: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "torchvision representation": {"representation_size": 24},
}
EVERY = (*TIMM, *HUGGING_FACE, *TORCHVISION)
KINDS = (
    "vit", "deit distilled", "dinov2 registers", "siglip", "eva02", "dinov3", "naflex map",
    "hf vit", "hf dinov3", "hf siglip2", "hf yolos mid positions", "torchvision",
)  # fmt: skip
_FIXED_SIZE = ("hf vitpose", *TORCHVISION)
"""Models that take images of the configured size only; those of torchvision are square."""


def backbone(name: str, *, square: bool = True, **kwargs: Any) -> tuple[nn.Module, tuple[int, int]]:
    """A model, of two blocks by default, and the image size that it runs at."""
    torch.manual_seed(0)
    if name in HUGGING_FACE:
        cls, settings = HUGGING_FACE[name]
        size = (64, 64 if square else 96)
        if name in _FIXED_SIZE:
            settings = settings | {"image_size": list(size)}
        config = getattr(transformers, cls).config_class(**(_HF_SIZES | settings | kwargs))
        return perturbed(getattr(transformers, cls)(config), std=0.02), size
    if name in TORCHVISION:
        vit = torchvision.models.VisionTransformer(
            **({**_TORCHVISION_SIZES, **TORCHVISION[name]} | kwargs)
        )
        return perturbed(vit, std=0.02), (64, 64)
    model, arguments, other = TIMM[name]
    patch = 14 if "patch14" in model else 32 if "patch32" in model else 16
    size = (70, 70) if patch == 14 else (64, 64)
    size = size if square else other
    vit = timm.create_model(model, img_size=size, **({"depth": 2} | arguments | kwargs))
    return perturbed(vit, std=0.02), size


def own_output(vit: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the model itself: logits, or pooled features without a head."""
    if not type(vit).__module__.startswith("transformers."):
        return vit

    def run(images: Tensor) -> Tensor:
        out = run_transformers(vit, images)
        for field in ("logits", "image_embeds", "pooler_output"):
            if getattr(out, field, None) is not None:
                return getattr(out, field)
        if getattr(out, "cls_tokens", None) is not None:
            return out.cls_tokens[-1]
        features = last_features(vit, images)
        pools_patches = type(vit).__name__.startswith(("IJepa", "VitPose", "Siglip"))
        return features.mean(dim=1) if pools_patches else features[:, 0]

    return run


def last_features(vit: nn.Module, images: Tensor) -> Tensor:
    """The model's own last features of all tokens, in its own order."""
    out = run_transformers(vit, images)
    found = getattr(out, "last_hidden_state", None)
    return out.feature_maps[-1] if found is None else found


def run_transformers(vit: nn.Module, images: Tensor) -> Any:
    """Run a model of transformers at any image size; MAE without shuffling."""
    name = type(vit).__name__
    if name.startswith("Siglip2"):
        grid = [side // 16 for side in images.shape[-2:]]
        patches = torch.stack([convert_image_to_patches(image, 16) for image in images])
        return vit(
            patches, torch.ones(patches.shape[:2]).long(), torch.tensor([grid] * len(images))
        )
    if name.startswith("ViTMAE"):
        count = images.shape[-2] // 16 * (images.shape[-1] // 16)
        order = torch.arange(float(count)).expand(len(images), -1)
        return vit(images, noise=order, interpolate_pos_encoding=True)
    if name.startswith(("Dinov2", "DINOv3", "VitPose", "Yolos")):
        return vit(images)  # positions are resized unasked, or not at all
    return vit(images, interpolate_pos_encoding=True)
