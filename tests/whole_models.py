"""Models that hold a ViT, small and with random weights, each with inputs and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
import torch
import torchvision
import transformers
from examples import perturbed
from torch import Tensor, nn

SIDE, PATCH = 64, 8
VISION = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
IMAGE_TOKEN = 98


@dataclass(frozen=True)
class WholeModel:
    """A kind of model that holds a ViT."""

    build: Callable[[], nn.Module]
    """Makes the model with random weights."""
    answer: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
    """What the model gives for images [B, 3, H, W], by its own call."""
    of_vit: Callable[[Any, Tensor], tuple[Tensor, ...]] = lambda vit, images: _tensors(vit(images))
    """What the ViT in it gives for the images."""
    size: tuple[int, int] = (SIDE, SIDE)
    """Height and width of the images."""
    windowed: bool = False
    """Whether attention is in windows, so that only FFNs can run on merged tokens."""
    has_class_token: bool = True
    """Whether EViT, which reads the attention of a class token, can reduce its tokens."""


def _tensors(found: Any) -> tuple[Tensor, ...]:
    """The tensors in what a model returns."""
    if isinstance(found, Tensor):
        return (found,)
    values = found.values() if hasattr(found, "values") else found
    return tuple(tensor for value in values for tensor in _tensors(value))


def _outputs(*names: str, **inputs: Any) -> Callable[[nn.Module, Tensor], tuple[Tensor, ...]]:
    """Read fields of the output of a model of transformers."""

    def answer(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        found = model(pixel_values=images, **inputs)
        values = [getattr(found, name) for name in names]
        return tuple(t for v in values for t in (v if isinstance(v, tuple) else (v,)))

    return answer


def _hidden(**inputs: Any) -> Callable[[nn.Module, Tensor], tuple[Tensor, ...]]:
    return _outputs(
        "last_hidden_state", "pooler_output", "hidden_states", output_hidden_states=True, **inputs
    )


def _of_config(name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    """A model of transformers from its configuration."""

    def build() -> nn.Module:
        cls = getattr(transformers, name)
        return cls(cls.config_class(*args, **settings))

    return build


def _dinov2(**settings: Any) -> Any:
    layers = {**VISION, "num_hidden_layers": 4}
    stages = [f"stage{layer}" for layer in range(1, 5)]
    return transformers.Dinov2Config(**layers, mlp_ratio=2, out_features=stages, **settings)


def _visible(model: Any) -> nn.Module:
    """Make the depths of a random model differ: its last ReLU would make them all zero."""
    convolutions = [part for part in model.head.modules() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight *= 10
        convolutions[-1].bias += 10
    return model  # type: ignore[no-any-return]


def _depth_anything() -> nn.Module:
    backbone = _dinov2(reshape_hidden_states=False, apply_layernorm=True)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[8, 12, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return _visible(transformers.DepthAnythingForDepthEstimation(config))


def depth_anything_small() -> nn.Module:
    """Depth-Anything-V2-Small in its own size, with random weights."""
    backbone = transformers.Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
        head_hidden_size=32,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def _dpt() -> nn.Module:
    config = transformers.DPTConfig(
        backbone_config=_dinov2(reshape_hidden_states=False, apply_layernorm=True),
        is_hybrid=False,
        hidden_size=48,
        neck_hidden_sizes=[8, 12, 16, 16],
        fusion_hidden_size=16,
        readout_type="project",
    )
    return _visible(transformers.DPTForDepthEstimation(config))


def _upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=_dinov2(reshape_hidden_states=True),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=48,
        auxiliary_channels=8,
        num_labels=5,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _vit_pose() -> nn.Module:
    backbone = transformers.VitPoseBackboneConfig(
        **{**VISION, "image_size": [SIDE, SIDE // 2], "patch_size": [PATCH, PATCH]},
        mlp_ratio=2,
        out_features=["stage3"],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=6)
    return transformers.VitPoseForPoseEstimation(config)


def _llava() -> nn.Module:
    text = transformers.LlamaConfig(**{**TEXT, "vocab_size": 100})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    text = transformers.GemmaConfig(
        **{**TEXT, "vocab_size": 100}, num_key_value_heads=1, head_dim=16
    )
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _prompt(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Logits of a prompt that has one token for each patch of an image."""
    patches = torch.full((len(images), (SIDE // PATCH) ** 2), IMAGE_TOKEN)
    ids = torch.cat([WORDS[: len(images), :1], patches, WORDS[: len(images), 1:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "PaliGemma" in type(model).__name__:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return (model(pixel_values=images, **inputs).logits,)


def _open_clip(**vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return open_clip.model.CLIP(
            embed_dim=24,
            vision_cfg={
                "image_size": SIDE, "patch_size": PATCH, "width": 48, "layers": 3, "head_width": 16
            } | vision,
            text_cfg={"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
        )  # fmt: skip

    return build


def _encode_image(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (model.encode_image(images),)


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A timm model as a part of another one, which reads its features in several ways."""

    def build() -> nn.Module:
        vit = timm.create_model(name, depth=3, **settings)
        return nn.ModuleDict({"encoder": vit})

    return build


def _timm_answer(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    vit = model["encoder"]
    features, maps = vit.forward_intermediates(images, indices=2)
    return vit(images), vit.forward_features(images), features, *maps


def _torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=SIDE, patch_size=PATCH, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96,
        num_classes=5,
    )  # fmt: skip


def _call(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    return (model(images),)


_WINDOWED = {**VISION, "window_size": 3}


def _sam(family: str, **decoder: Any) -> Callable[[], nn.Module]:
    vision = {"mlp_dim": 96, "num_pos_feats": 8, "output_channels": 16, "global_attn_indexes": [1]}
    prompts = {"image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 8}
    decoder |= {"mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return _of_config(
        f"{family}Model",
        vision_config=_WINDOWED | vision,
        prompt_encoder_config=prompts | {"hidden_size": 16},
        mask_decoder_config=decoder | {"hidden_size": 16},
    )


def _sam_answer(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    points = torch.full((len(images), 1, 1, 2), 20.0)
    found = model(pixel_values=images, input_points=points)
    return found.pred_masks, found.iou_scores


def _mae(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    noise = torch.arange(64.0).expand(len(images), -1)  # rising: the patches keep their order
    return (model(images, noise=noise).last_hidden_state,)


def _patched(images: Tensor) -> dict[str, Any]:
    """Images cut into patches, as the image processor of SigLIP 2 gives them."""
    rows, columns = images.shape[-2] // PATCH, images.shape[-1] // PATCH
    grid = images.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
    return {
        "pixel_values": grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(len(images), rows * columns, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(images)),
    }


def _siglip2(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    found = model(input_ids=WORDS, **_patched(images))
    return found.logits_per_image, found.image_embeds, found.text_embeds


_CLIP = _outputs("logits_per_image", "image_embeds", "text_embeds", input_ids=WORDS)
_SIGLIP = {"vision_config": VISION, "text_config": TEXT | {"projection_size": 48}}
WHOLE: dict[str, WholeModel] = {
    "CLIP": WholeModel(
        _of_config("CLIPModel", vision_config=VISION, text_config=TEXT, projection_dim=24), _CLIP
    ),
    "CLIP image features": WholeModel(_of_config("CLIPVisionModel", **VISION), _hidden()),
    "SigLIP": WholeModel(_of_config("SiglipModel", **_SIGLIP), _CLIP, has_class_token=False),
    "SigLIP 2": WholeModel(
        _of_config(
            "Siglip2Model",
            vision_config={name: value for name, value in VISION.items() if name != "image_size"}
            | {"num_patches": (SIDE // PATCH) ** 2},
            text_config=_SIGLIP["text_config"],
        ),
        _siglip2,
        of_vit=lambda vit, images: _tensors(vit(**_patched(images))),
        has_class_token=False,
    ),
    "open_clip": WholeModel(_open_clip(), _encode_image),
    "open_clip with a timm tower": WholeModel(
        _open_clip(
            timm_model_name="test_vit", timm_pool="token", timm_proj="linear"
        ),
        _encode_image,
        size=(128, 128),
    ),
    "ViT features": WholeModel(_of_config("ViTModel", **VISION), _hidden()),
    "ViT classifier": WholeModel(
        _of_config("ViTForImageClassification", **VISION, num_labels=5), _outputs("logits")
    ),
    "DeiT features": WholeModel(_of_config("DeiTModel", **VISION), _hidden()),
    "DINOv2 features": WholeModel(_of_config("Dinov2Model", **VISION, mlp_ratio=2), _hidden()),
    "DINOv2 classifier": WholeModel(
        _of_config("Dinov2ForImageClassification", **VISION, mlp_ratio=2, num_labels=5),
        _outputs("logits"),
    ),
    "DINOv2 with registers": WholeModel(
        _of_config("Dinov2WithRegistersModel", **VISION, mlp_ratio=2), _hidden()
    ),
    "DINOv2 feature maps": WholeModel(
        lambda: transformers.Dinov2Backbone(_dinov2()), _outputs("feature_maps"), size=(SIDE, 48)
    ),
    "DINOv2 with registers, feature maps": WholeModel(
        lambda: transformers.Dinov2WithRegistersBackbone(
            transformers.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, out_indices=[1, 3])
        ),
        _outputs("feature_maps"),
    ),
    "DINOv3 features": WholeModel(_of_config("DINOv3ViTModel", **VISION), _hidden()),
    "DINOv3 feature maps": WholeModel(
        _of_config("DINOv3ViTBackbone", **VISION, out_indices=[1, 3]),
        _outputs("feature_maps"),
        size=(SIDE, 48),
    ),
    "I-JEPA features": WholeModel(
        _of_config("IJepaModel", **VISION), _outputs("last_hidden_state"), has_class_token=False
    ),
    "MAE features": WholeModel(
        _of_config("ViTMAEModel", **VISION, mask_ratio=0.0), _mae, of_vit=_mae
    ),
    "Depth Anything": WholeModel(_depth_anything, _outputs("predicted_depth")),
    "DPT": WholeModel(_dpt, _outputs("predicted_depth")),
    "UperNet": WholeModel(_upernet, _outputs("logits")),
    "ViTPose": WholeModel(
        _vit_pose, _outputs("heatmaps"), size=(SIDE, SIDE // 2), has_class_token=False
    ),
    "OWL-ViT image features": WholeModel(_of_config("OwlViTVisionModel", **VISION), _hidden()),
    "OWL-ViT": WholeModel(
        _of_config(
            "OwlViTForObjectDetection", vision_config=VISION, text_config=TEXT, projection_dim=32
        ),
        _outputs("logits", "pred_boxes", input_ids=WORDS),
    ),
    "OWLv2": WholeModel(
        _of_config(
            "Owlv2ForObjectDetection", vision_config=VISION, text_config=TEXT, projection_dim=32
        ),
        _outputs("logits", "pred_boxes", input_ids=WORDS),
    ),
    "YOLOS": WholeModel(
        _of_config(
            "YolosForObjectDetection",
            **{**VISION, "image_size": [SIDE, SIDE]},
            num_detection_tokens=6,
            use_mid_position_embeddings=False,
            num_labels=5,
        ),
        _outputs("logits", "pred_boxes"),
    ),
    "LLaVA": WholeModel(_llava, _prompt),
    "PaliGemma": WholeModel(_paligemma, _prompt, has_class_token=False),
    "timm ViT": WholeModel(
        _timm("vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH), _timm_answer
    ),
    "timm Eva": WholeModel(
        _timm("eva02_tiny_patch14_224", img_size=SIDE, patch_size=PATCH), _timm_answer
    ),
    "timm DINOv3": WholeModel(
        _timm("vit_small_patch16_dinov3", img_size=SIDE, patch_size=PATCH), _timm_answer
    ),
    "timm NaFlexVit": WholeModel(
        _timm("naflexvit_base_patch16_gap", patch_size=PATCH, img_size=SIDE, embed_dim=48,
              num_heads=3),
        _timm_answer,
        has_class_token=False,
    ),
    "torchvision": WholeModel(_torchvision, _call),
    "SAM": WholeModel(_sam("Sam"), _sam_answer, windowed=True),
    "SAM-HQ": WholeModel(_sam("SamHQ", vit_dim=48), _sam_answer, windowed=True),
    "ViTDet": WholeModel(
        _of_config(
            "VitDetModel", **_WINDOWED, mlp_ratio=2, window_block_indices=[0, 2]
        ),
        _outputs("last_hidden_state"),
        windowed=True,
    ),
    "ViTDet feature maps": WholeModel(
        _of_config("VitDetBackbone", **_WINDOWED, mlp_ratio=2, out_indices=[1, 3]),
        _outputs("feature_maps"),
        windowed=True,
    ),
    "timm SAM": WholeModel(
        lambda: timm.create_model(
            "samvit_base_patch16", img_size=SIDE, patch_size=PATCH, embed_dim=48, depth=3,
            num_heads=3, window_size=3, global_attn_indexes=(1,), neck_chans=8, num_classes=5,
        ),
        _call,
        windowed=True,
    ),
}  # fmt: skip


COMPILED = (
    "CLIP", "SigLIP", "SigLIP 2", "open_clip", "ViT features", "DeiT features", "DINOv2 features",
    "DINOv2 with registers", "DINOv2 feature maps", "DINOv3 features", "I-JEPA features",
    "MAE features", "ViTPose", "OWL-ViT", "OWLv2", "YOLOS", "timm ViT", "timm Eva",
    "torchvision", "SAM", "SAM-HQ", "ViTDet", "timm SAM",
)  # fmt: skip
"""Models whose ViT the tests compile: one for each kind of block."""
_BOXES = {"candidate_labels": ["cat", "dog"], "threshold": 0.0}
_MASKS = {"points_per_crop": 3, "pred_iou_thresh": -1e9, "stability_score_thresh": -1.0}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("zero-shot-image-classification", {"candidate_labels": ["cat", "dog"]}),
    "SigLIP": ("zero-shot-image-classification", {"candidate_labels": ["cat", "dog"]}),
    "SigLIP 2": ("zero-shot-image-classification", {"candidate_labels": ["cat", "dog"]}),
    "ViT classifier": ("image-classification", {}),
    "DINOv2 classifier": ("image-classification", {}),
    "CLIP image features": ("image-feature-extraction", {}),
    "ViT features": ("image-feature-extraction", {}),
    "DeiT features": ("image-feature-extraction", {}),
    "DINOv2 with registers": ("image-feature-extraction", {}),
    "OWL-ViT image features": ("image-feature-extraction", {}),
    "ViTDet": ("image-feature-extraction", {}),
    "I-JEPA features": ("image-feature-extraction", {}),
    "DINOv2 features": ("image-feature-extraction", {}),
    "DINOv3 features": ("image-feature-extraction", {}),
    "Depth Anything": ("depth-estimation", {}),
    "DPT": ("depth-estimation", {}),
    "UperNet": ("image-segmentation", {}),
    "OWL-ViT": ("zero-shot-object-detection", _BOXES),
    "OWLv2": ("zero-shot-object-detection", _BOXES),
    "YOLOS": ("object-detection", {"threshold": 0.0}),
    "LLaVA": (
        "image-text-to-text",
        {
            "text": "<image>a photo of",
            "return_tensors": True,
            "generate_kwargs": {"max_new_tokens": 4, "do_sample": False},
        },
    ),
    "SAM": ("mask-generation", _MASKS),
    "SAM-HQ": ("mask-generation", _MASKS),
}
"""Models that the tests call through a pipeline of transformers: its task, and arguments."""


def whole_model(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode, and two images for it."""
    torch.manual_seed(0)
    kind = WHOLE[name]
    model = perturbed(kind.build()).eval()
    return model, torch.randn(2, 3, *kind.size, generator=torch.Generator().manual_seed(1))
