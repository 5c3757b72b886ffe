"""How the ViTs of the transformers library name their parts, one table entry per family."""

from dataclasses import dataclass, replace
from typing import Literal

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of the images."""
_HALF: Statistics = ((0.5,) * 3, (0.5,) * 3)
_IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_OPENAI: Statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
Pooling = Literal["class token", "patches", "class token and patches", "patches before norm"]
"""Which tokens are pooled: the class token, the mean of the patches, or both in one vector."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of the parts of one family, and what else differs between families by a word only."""

    trunk: str | None = None
    """Name of the ViT inside a model that holds it; None: no model of the family holds it."""
    blocks: str = "layers"
    """Path of the list of blocks in the ViT."""
    attention: str = "attention"
    """Path of the module in a block that holds the layers of queries, keys and values."""
    query_key_value: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    """Names of these three layers."""
    attention_dropout: str = "attention_dropout"
    """Attribute of that module: the dropout probability of the attention weights."""
    attention_branch: tuple[str, ...] = ("attention.o_proj", "dropout")
    """Paths of the modules of a block that run after attention, up to the residual, in order."""
    ffn_branch: tuple[str, ...] = ("mlp", "dropout")
    """Paths of the modules of a block that run after the second norm, in order."""
    norm1: str = "layernorm_before"
    """Name of the norm before attention."""
    norm2: str = "layernorm_after"
    """Name of the norm before the FFN."""
    patch_convolution: str | None = "embeddings.patch_embeddings.projection"
    """Path of the convolution that makes patches; None: there is none, or the ViT leaves patches
    out after it."""
    pre_norm: str | None = None
    """Name of the norm between embedding and first block; None: there is none."""
    norm: str = "layernorm"
    """Name of the final norm."""
    class_tokens: int = 1
    """Number of class and distillation tokens."""
    more_tokens: str | None = None
    """Field of the configuration: the number of register or detection tokens; None: there are none.
    """
    resizing: Literal["on request", "always", "never"] = "on request"
    """When the embedding resizes the positions to another image size."""
    pooled: Pooling = "class token"
    """What a model without a classification head gives as its pooled output."""
    classified: Pooling = "class token"
    """What the classification head reads."""
    statistics: Statistics = _HALF
    """Mean and standard deviation of the images that the published models were trained on."""


_VIT = Names(trunk="vit")
_DINOV2 = Names(
    trunk="dinov2",
    blocks="encoder.layer",
    norm1="norm1",
    norm2="norm2",
    attention_branch=("attention.o_proj", "layer_scale1", "drop_path"),
    ffn_branch=("mlp", "layer_scale2", "drop_path"),
    resizing="always",
    classified="class token and patches",
)
_REGISTERS = replace(_DINOV2, trunk="dinov2_with_registers", more_tokens="num_register_tokens")
_DINOV3 = replace(
    _REGISTERS,
    trunk=None,
    blocks="model.layer",
    attention_dropout="dropout",
    patch_convolution="embeddings.patch_embeddings",
    norm="norm",
    statistics=_IMAGENET,
)
_CLIP = Names(
    trunk="vision_model",
    blocks="encoder.layers",
    attention="self_attn",
    attention_dropout="dropout",
    attention_branch=("self_attn.out_proj",),
    ffn_branch=("mlp",),
    norm1="layer_norm1",
    norm2="layer_norm2",
    patch_convolution="embeddings.patch_embedding",
    pre_norm="pre_layrnorm",
    norm="post_layernorm",
    classified="patches before norm",
)
_SIGLIP = replace(_CLIP, pre_norm=None, class_tokens=0, pooled="patches", classified="patches")
_SIGLIP2 = replace(_SIGLIP, patch_convolution=None)
_OWL = replace(_CLIP, pre_norm="pre_layernorm", statistics=_OPENAI)
_IJEPA = replace(
    _VIT,
    trunk="ijepa",
    class_tokens=0,
    pooled="patches",
    classified="patches",
    statistics=_IMAGENET,
)
# VitPose and YOLOS have the blocks that ViT had in earlier releases.
_VITPOSE = Names(
    blocks="encoder.layer",
    attention="attention.attention",
    query_key_value=("query", "key", "value"),
    attention_dropout="dropout_prob",
    attention_branch=("attention.output.dense", "attention.output.dropout"),
    ffn_branch=("mlp",),
    class_tokens=0,
    resizing="never",
    pooled="patches",
    statistics=_IMAGENET,
)
_YOLOS = replace(
    _VITPOSE,
    ffn_branch=("intermediate", "output.dense", "output.dropout"),
    class_tokens=1,
    more_tokens="num_detection_tokens",
    resizing="always",
    pooled="class token",
)
CLASSES = {
    "ViTModel": _VIT,
    "ViTForImageClassification": _VIT,
    "DeiTModel": replace(_VIT, trunk="deit", class_tokens=2),
    "DeiTForImageClassification": replace(_VIT, trunk="deit", class_tokens=2),
    "DeiTForImageClassificationWithTeacher": replace(_VIT, trunk="deit", class_tokens=2),
    "ViTMAEModel": replace(_VIT, trunk=None, patch_convolution=None, statistics=_IMAGENET),
    "IJepaModel": _IJEPA,
    "IJepaForImageClassification": _IJEPA,
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2ForImageClassification": _DINOV2,
    "Dinov2WithRegistersModel": _REGISTERS,
    "Dinov2WithRegistersBackbone": _REGISTERS,
    "Dinov2WithRegistersForImageClassification": _REGISTERS,
    "DINOv3ViTModel": _DINOV3,
    "DINOv3ViTBackbone": _DINOV3,
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": _CLIP,
    "CLIPForImageClassification": _CLIP,
    "SiglipVisionModel": _SIGLIP,
    "SiglipForImageClassification": _SIGLIP,
    "Siglip2VisionModel": _SIGLIP2,
    "Siglip2ForImageClassification": _SIGLIP2,
    "OwlViTVisionModel": _OWL,
    "Owlv2VisionModel": _OWL,
    "OwlViTVisionTransformer": _OWL,
    "Owlv2VisionTransformer": _OWL,
    "VitPoseBackbone": _VITPOSE,
    "YolosModel": _YOLOS,
}
"""The classes of transformers that are supported."""
