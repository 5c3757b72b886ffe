"""Which `Anatomy` a model has."""

from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from torch import nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.dinov3 import HuggingFaceDINOv3
from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.backbones.huggingface_names import CLASSES
from tokendial.backbones.open_clip import OpenClipViT
from tokendial.backbones.pooling import QueryPooling
from tokendial.backbones.siglip import HuggingFaceSiglip, HuggingFaceSiglip2
from tokendial.backbones.timm_eva import TimmEva
from tokendial.backbones.timm_naflex import TimmNaFlex
from tokendial.backbones.timm_video import TimmFrames, TimmTubelets
from tokendial.backbones.timm_vit import TimmViT
from tokendial.backbones.torchvision_vit import TorchvisionViT
from tokendial.backbones.videomae import TubeletEmbed
from tokendial.backbones.vit_mae import HuggingFaceMAE
from tokendial.backbones.windowed import WindowedEncoder
from tokendial.backbones.yolos import HuggingFaceYolos

TRANSFORMERS = "transformers."
TORCHVISION = "torchvision."
_WITH_THEIR_OWN_COMPUTATION: dict[str, type[HuggingFaceViT]] = {
    "DINOv3ViTBackbone": HuggingFaceDINOv3,
    "DINOv3ViTModel": HuggingFaceDINOv3,
    "Siglip2ForImageClassification": HuggingFaceSiglip2,
    "Siglip2VisionModel": HuggingFaceSiglip2,
    "SiglipForImageClassification": HuggingFaceSiglip,
    "SiglipVisionModel": HuggingFaceSiglip,
    "ViTMAEModel": HuggingFaceMAE,
    "YolosModel": HuggingFaceYolos,
}
"""Classes of transformers that need more than a table of names."""
SUPPORTED = (
    "timm's VisionTransformer built of the standard pre-norm Block (ViT, DeiT, also distilled, "
    "DeiT-III, DINO, DINOv2 with or without registers, MAE, AugReg, CLIP and SigLIP image towers), "
    "timm's Eva (EVA-02, DINOv3, Perception Encoder) and NaFlexVit, open_clip's and torchvision's "
    f"VisionTransformer, and of transformers {', '.join(CLASSES)}; for clips, models of video_vit "
    "and videomae_*"
)


def anatomy_of(vit: nn.Module) -> Anatomy:
    """Find out which kind of ViT a model is, and return its `Anatomy`.

    Raises:
        ValueError: If the kind is not supported; the message lists the supported ones.
    """
    if WindowedEncoder.of(vit):
        raise ValueError(
            f"{type(vit).__name__} has attention in windows, which need every token in its place: "
            "use td.attach(model, reduce=td.FFNMerge(...))."
        )
    kind = _kind_of(vit)
    if problem := kind.problem(vit):
        raise ValueError(f"This model is not supported: {problem}. Supported are {SUPPORTED}.")
    return kind(vit)


def refusal(vit: nn.Module) -> str | None:
    """Why a ViT of a known class cannot be run; None: it can, or its class is not known."""
    kind = _kind_of(vit)
    return kind.problem(vit) if kind.recognises(vit) else None


def _kind_of(vit: nn.Module) -> type[Anatomy]:
    library, name = type(vit).__module__, type(vit).__name__
    if library.startswith(TRANSFORMERS):
        return _WITH_THEIR_OWN_COMPUTATION.get(name, HuggingFaceViT)
    if library.startswith(TORCHVISION):
        return TorchvisionViT
    if OpenClipViT.owns(vit):
        return OpenClipViT
    if isinstance(vit, Eva):
        return TimmEva
    if isinstance(vit, NaFlexVit):
        return TimmNaFlex
    if isinstance(getattr(vit, "patch_embed", None), TubeletEmbed):
        return TimmTubelets
    if isinstance(getattr(vit, "head", None), QueryPooling):
        return TimmFrames
    return TimmViT
