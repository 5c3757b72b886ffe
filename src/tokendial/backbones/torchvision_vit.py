"""torchvision's VisionTransformer: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy, split_heads
from tokendial.backbones.in_projection import InProjection
from tokendial.errors import error_message
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

_ARGUMENTS = (
    "image_size",
    "patch_size",
    "num_layers",
    "num_heads",
    "hidden_dim",
    "mlp_dim",
    "dropout",
    "attention_dropout",
    "num_classes",
    "representation_size",
)
"""Arguments of torchvision's class with which a model is built again."""
_BUILDERS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_CLASS = ("torchvision.models.vision_transformer", "VisionTransformer")

_EPS = 1e-6


class TorchvisionViT(Anatomy):
    """torchvision's VisionTransformer, on images of its own size.

    Queries, keys and values have one weight that is not a linear layer, so adapters in linear
    layers (LoRA, SSF, FacT) act on the output of attention and on the FFN only. With `heads`
    replaced by nn.Identity, `classify` returns the class token.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self._in_projections = [
            InProjection(block.self_attention) for block in self.vit.encoder.layers
        ]

    @classmethod
    def recognises(cls, vit: nn.Module) -> bool:
        return (type(vit).__module__, type(vit).__name__) == _CLASS

    @classmethod
    def problem(cls, vit: Any) -> str | None:
        if not cls.recognises(vit):
            return f"{type(vit).__name__} is of another class"
        if not isinstance(vit.conv_proj, nn.Conv2d):
            return "several convolutions compute its patches (conv_stem_configs)"
        if not isinstance(vit.heads, nn.Identity) and not hasattr(vit.heads, "head"):
            return f"its heads are {type(vit.heads).__name__}: put a new layer at heads.head"
        if not isinstance(vit.encoder.ln, nn.LayerNorm) or vit.encoder.ln.eps != _EPS:
            return "its norms are not torchvision's own (norm_layer)"
        for block in vit.encoder.layers:
            attention = block.self_attention
            if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
                return f"its attention layers are {type(attention).__name__} of another kind"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.vit.encoder.layers  # type: ignore[no-any-return]

    @property
    def shape(self) -> ViTShape:
        return ViTShape(
            depth=len(self.blocks),
            embed_dim=self.vit.hidden_dim,
            num_prefix_tokens=1,
            num_patches=self.vit.seq_length - 1,
            has_class_token=True,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        return self.vit.image_size, self.vit.image_size

    @property
    def in_chans(self) -> int:
        return int(self.vit.conv_proj.in_channels)

    @property
    def patch_convolution(self) -> nn.Module:
        return self.vit.conv_proj  # type: ignore[no-any-return]

    @property
    def heads(self) -> list[nn.Module]:
        return [self.vit.heads.head] if hasattr(self.vit.heads, "head") else []

    @property
    def head_reads_prefix_only(self) -> bool:
        return True

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def embed(self, images_B3HW: Tensor) -> Tokens:
        vit, side = self.vit, self.vit.image_size
        height, width = images_B3HW.shape[-2:]
        if (height, width) != self.image_size:
            raise ValueError(
                f"images must be {side}x{side}, got {height}x{width}; create the torchvision model "
                "with another image_size."
            )
        patches = vit.conv_proj(images_B3HW).flatten(2).transpose(1, 2)
        x = torch.cat([vit.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        rows = side // vit.patch_size
        return Tokens(vit.encoder.dropout(x + vit.encoder.pos_embedding), 1, (rows, rows))

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).ln_1(x_BND)  # type: ignore[no-any-return]

    def _in_projection(self, layer: int) -> InProjection:
        if self._replica is not None:
            return InProjection(self.block(layer).self_attention)
        return self._in_projections[layer - 1]

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.block(layer).self_attention.num_heads
        parts = self._in_projection(layer)(x_BND).chunk(3, dim=-1)
        q, k, v = (split_heads(part, heads) for part in parts)
        return q, k, v

    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        projection, width = self._in_projection(layer), self.vit.hidden_dim
        query, value = slice(0, width), slice(2 * width, 3 * width)
        return {"query": (projection, query), "value": (projection, value)}

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return block.dropout(block.self_attention.out_proj(out_BND))  # type: ignore[no-any-return]

    def attention_settings(self, layer: int) -> tuple[float, float]:
        attn = self.block(layer).self_attention
        return attn.head_dim**-0.5, attn.dropout if attn.training else 0.0

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).ln_2(x_BND)  # type: ignore[no-any-return]

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).mlp(x_BND)  # type: ignore[no-any-return]

    def norm(self, x_BND: Tensor) -> Tensor:
        return self.vit.encoder.ln(x_BND)  # type: ignore[no-any-return]

    def classify(self, tokens: Tokens) -> Tensor:
        return self.vit.heads(self.norm(tokens.x)[:, 0])  # type: ignore[no-any-return]


def torchvision_arguments(vit: Any) -> dict[str, Any]:
    """The arguments that build the same model again, with the classes of its present head."""
    own = {"num_layers": len(vit.encoder.layers), "num_heads": vit.encoder.layers[0].num_heads}
    own["num_classes"] = vit.heads.head.out_features if hasattr(vit.heads, "head") else 0
    return {name: own.get(name, getattr(vit, name, None)) for name in _ARGUMENTS}


def create_torchvision(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: The class, VisionTransformer, or one of its builders, such as vit_b_16.
        args: Arguments of it. With num_classes 0, `heads` is nn.Identity.

    Raises:
        ValueError: If there is no such model, or an argument does not fit.
    """
    from torchvision.models import vision_transformer

    if name not in (_CLASS[1], *_BUILDERS):
        raise ValueError(
            f"model.name 'torchvision.{name}' is not a model of torchvision that is supported: one "
            f"of {', '.join((_CLASS[1], *_BUILDERS))}."
        )
    headless = args.get("num_classes") == 0
    try:
        vit: Any = getattr(vision_transformer, name)(
            **dict(args) | ({"num_classes": 1} if headless else {})
        )
    except Exception as error:  # unsuitable arguments raise anything
        raise ValueError(
            f"model 'torchvision.{name}' cannot be built: {error_message(error)}"
        ) from error
    if headless:
        vit.heads = nn.Identity()
    return vit  # type: ignore[no-any-return]  # torchvision has no types here
