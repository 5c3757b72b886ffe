"""ViTs of the transformers library: ViT, DeiT, DINOv2 (with registers), CLIP's image tower."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy, mean_by_size, split_heads
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@dataclass(frozen=True)
class _Names:
    """Attribute names of the parts of a model and of a block, in one family of transformers."""

    trunk: str
    """Name of the ViT inside a classification model."""
    blocks: str
    attention: str = "attention"
    output: str = "o_proj"
    norm1: str = "layernorm_before"
    norm2: str = "layernorm_after"
    scales: tuple[str, str] | None = None
    dropout: str | None = "dropout"
    pre_norm: str | None = None
    norm: str = "layernorm"


_VIT = _Names(trunk="vit", blocks="layers")
_DINOV2 = _Names(
    trunk="dinov2",
    blocks="encoder.layer",
    norm1="norm1",
    norm2="norm2",
    scales=("layer_scale1", "layer_scale2"),
    dropout="drop_path",
)
_CLIP = _Names(
    trunk="vision_model",
    blocks="encoder.layers",
    attention="self_attn",
    output="out_proj",
    norm1="layer_norm1",
    norm2="layer_norm2",
    dropout=None,
    pre_norm="pre_layrnorm",
    norm="post_layernorm",
)
_FAMILIES = {
    "ViT": _VIT,
    "DeiT": replace(_VIT, trunk="deit"),
    "Dinov2": _DINOV2,
    "Dinov2WithRegisters": replace(_DINOV2, trunk="dinov2_with_registers"),
    "CLIP": _CLIP,
}
CLASSES = {
    name: names
    for family, names in _FAMILIES.items()
    for name in (f"{family}Model", f"{family}ForImageClassification")
} | {
    "DeiTForImageClassificationWithTeacher": _FAMILIES["DeiT"],
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": _CLIP,
}
del CLASSES["CLIPModel"]  # it also has a text tower


class HuggingFaceViT(Anatomy):
    """A ViT of the transformers library, release 5.23 or later."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.names = CLASSES[type(vit).__name__]

    @property
    def trunk(self) -> Any:
        """The ViT without the classification model around it."""
        return getattr(self.vit, self.names.trunk, self.vit)

    @classmethod
    def problem(cls, vit: nn.Module) -> str | None:
        name = type(vit).__name__
        if not type(vit).__module__.startswith("transformers.") or name not in CLASSES:
            return f"{name} is of another class"
        names = CLASSES[name]
        try:
            blocks: Any = getattr(vit, names.trunk, vit).get_submodule(names.blocks)
            blocks[0].get_submodule(names.attention).q_proj  # noqa: B018  # raises if the layer does not exist
        except AttributeError:
            return f"this {name} is of another release of transformers than 5.23 and later"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.get_submodule(self.names.blocks)  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """The configuration of the image tower."""
        return self.trunk.config

    @property
    def shape(self) -> ViTShape:
        height, width = self.image_size
        prefix = 1 + getattr(self.config, "num_register_tokens", 0)
        if self.names.trunk == "deit":
            prefix += 1  # the distillation token
        return ViTShape(
            depth=len(self.blocks),
            embed_dim=self.config.hidden_size,
            num_prefix_tokens=prefix,
            num_patches=(height // self._patch[0]) * (width // self._patch[1]),
            has_class_token=True,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        return _pair(self.config.image_size)

    @property
    def _patch(self) -> tuple[int, int]:
        return _pair(self.config.patch_size)

    @property
    def in_chans(self) -> int:
        return int(self.config.num_channels)

    @property
    def heads(self) -> list[nn.Module]:
        names = ("classifier", "cls_classifier", "distillation_classifier")
        return [head for name in names if (head := getattr(self.vit, name, None)) is not None]

    def embed(self, images_B3HW: Tensor) -> Tokens:
        height, width = images_B3HW.shape[-2:]
        patch = self._patch
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f"images must have sides divisible by the patch size {patch[0]}x{patch[1]}, "
                f"got {height}x{width}."
            )
        # DINOv2 always resizes its positions, the other models only on request.
        options = {}
        if (height, width) != self.image_size and self.names.scales is None:
            options["interpolate_pos_encoding"] = True
        x = self.trunk.embeddings(images_B3HW, **options)
        if self.names.pre_norm:
            x = getattr(self.trunk, self.names.pre_norm)(x)
        grid = (height // patch[0], width // patch[1])
        return Tokens(x, x.shape[1] - grid[0] * grid[1], grid)

    def _part(self, layer: int, name: str) -> Any:
        return getattr(self.block(layer), name)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._part(layer, self.names.norm1)(x_BND)  # type: ignore[no-any-return]

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        attn = self._part(layer, self.names.attention)
        heads = self.config.num_attention_heads
        q, k, v = (split_heads(p(x_BND), heads) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        return q, k, v

    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        attn, whole = self._part(layer, self.names.attention), slice(None)
        return {"query": (attn.q_proj, whole), "value": (attn.v_proj, whole)}

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        attn = self._part(layer, self.names.attention)
        return self._residual(layer, getattr(attn, self.names.output)(out_BND), 0)

    def attention_settings(self, layer: int) -> tuple[float, float]:
        attn = self._part(layer, self.names.attention)
        # In CLIP the attribute is named `dropout`.
        dropout: Any = getattr(attn, "attention_dropout", None) or getattr(attn, "dropout", 0.0)
        return attn.head_dim**-0.5, dropout if attn.training else 0.0

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._part(layer, self.names.norm2)(x_BND)  # type: ignore[no-any-return]

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._residual(layer, self._part(layer, "mlp")(x_BND), 1)

    def _residual(self, layer: int, x_BND: Tensor, branch: int) -> Tensor:
        """Apply the block's LayerScale and dropout to the output of a branch."""
        if self.names.scales:
            x_BND = self._part(layer, self.names.scales[branch])(x_BND)
        if self.names.dropout:
            x_BND = self._part(layer, self.names.dropout)(x_BND)
        return x_BND

    def norm(self, x_BND: Tensor) -> Tensor:
        return getattr(self.trunk, self.names.norm)(x_BND)  # type: ignore[no-any-return]

    @property
    def head_reads_prefix_only(self) -> bool:
        classifies = hasattr(self.vit, "classifier")
        # DINOv2's and CLIP's classifiers also read the mean of the patch tokens.
        return not classifies or not (self.names.scales or self.names is _CLIP)

    def classify(self, tokens: Tokens) -> Tensor:
        vit: Any = self.vit
        name = type(vit).__name__
        patches = slice(tokens.prefix, None)
        size = None if tokens.size is None else tokens.size[:, patches]
        if name == "CLIPForImageClassification":  # this model skips the last norm
            return vit.classifier(mean_by_size(tokens.x[:, patches], size))  # type: ignore[no-any-return]
        x = self.norm(tokens.x)
        first = x[:, 0]
        if name == "DeiTForImageClassificationWithTeacher":
            both = vit.cls_classifier(first) + vit.distillation_classifier(x[:, 1])
            return both / 2  # type: ignore[no-any-return]
        if name == "CLIPVisionModelWithProjection":
            return vit.visual_projection(first)  # type: ignore[no-any-return]
        if not hasattr(vit, "classifier"):
            pooler = getattr(vit, "pooler", None)
            return first if pooler is None else pooler(x)
        if self.names.scales:  # DINOv2 reads the class token and the mean of the patches
            first = torch.cat([first, mean_by_size(x[:, patches], size)], dim=1)
        return vit.classifier(first)  # type: ignore[no-any-return]


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width
