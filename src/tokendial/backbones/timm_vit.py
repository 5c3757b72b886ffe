"""timm's VisionTransformer: ViT, DeiT, DeiT-III, DINO, DINOv2, MAE, AugReg, CLIP, SigLIP."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy, bare, mean_by_size
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

HEADS = ("head", "head_dist")
"""Attribute names of timm's classification heads; the second is DeiT's distillation head."""


class TimmAnatomy(Anatomy):
    """The parts that timm's VisionTransformer and Eva have in common."""

    model_class: type[nn.Module]
    block_classes: tuple[type[nn.Module], ...]
    attention_classes: tuple[type[nn.Module], ...]

    @classmethod
    def recognises(cls, vit: nn.Module) -> bool:
        return isinstance(vit, cls.model_class)

    @classmethod
    def problem(cls, vit: Any) -> str | None:
        own: Any = cls.model_class
        if not cls.recognises(vit):
            return f"{type(vit).__name__} is of another class"
        if type(vit).forward_features is not own.forward_features:
            return f"{type(vit).__name__} has a forward pass of its own"
        if isinstance(vit.patch_drop, PatchDropout | PatchDropoutWithIndices):
            return "it drops patches at random (patch_drop_rate)"
        if vit.attn_pool is not None and not isinstance(vit.attn_pool, AttentionPoolLatent):
            return f"it pools with {type(vit.attn_pool).__name__}"
        for block in vit.blocks:
            if type(block) not in cls.block_classes:
                return f"its blocks are {type(block).__name__}"
            if type(block.attn) not in cls.attention_classes:
                return f"its attention layers are {type(block.attn).__name__}"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.vit.blocks  # type: ignore[no-any-return]

    def block(self, layer: int) -> Any:
        # Each part of a block asks for it, so it is found without a call of `blocks`.
        return self.vit.blocks[layer - 1] if self._replica is None else self._replica

    @property
    def shape(self) -> ViTShape:
        return ViTShape(
            depth=len(self.vit.blocks),
            embed_dim=self.vit.embed_dim,
            num_prefix_tokens=self.vit.num_prefix_tokens,
            num_patches=self.vit.patch_embed.num_patches,
            has_class_token=self.vit.cls_token is not None,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.vit.patch_embed.img_size
        return height, width

    @property
    def in_chans(self) -> int:
        return int(self.vit.in_chans)

    @property
    def patch_convolution(self) -> nn.Module | None:
        layer = self.vit.patch_embed.proj
        return layer if isinstance(layer, nn.Conv2d) else None

    @property
    def heads(self) -> list[nn.Module]:
        return [head for name in HEADS if (head := getattr(self.vit, name, None)) is not None]

    @property
    def head_reads_prefix_only(self) -> bool:
        return self.vit.attn_pool is None and self.vit.global_pool == "token"

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        cfg = self.vit.pretrained_cfg
        return tuple(cfg["mean"]), tuple(cfg["std"])

    def grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches; raise a ValueError if the image size does not fit."""
        vit = self.vit
        height, width = images_B3HW.shape[-2:]
        if vit.dynamic_img_size:
            patch = vit.patch_embed.patch_size
            if not vit.patch_embed.dynamic_img_pad and (height % patch[0] or width % patch[1]):
                raise ValueError(
                    f"images must have sides divisible by the patch size {patch[0]}x{patch[1]}, "
                    f"got {height}x{width}."
                )
        elif (height, width) != self.image_size:
            size = self.image_size
            raise ValueError(
                f"images must be {size[0]}x{size[1]}, got {height}x{width}; create the timm model "
                f"with img_size=({height}, {width}) or dynamic_img_size=True."
            )
        rows, columns = vit.patch_embed.dynamic_feat_size((height, width))
        return rows, columns

    def embed_none(self, images_0: Tensor) -> Tokens:
        """Return the tokens of an empty batch, which timm's own embedding cannot compute."""
        one = self.embed(images_0.new_zeros(1, *images_0.shape[1:]))
        return replace(one, x=one.x[:0])

    def attention_settings(self, layer: int) -> tuple[float, float]:
        attn = self.block(layer).attn
        return attn.scale, attn.attn_drop.p if attn.training else 0.0

    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        attn = self.block(layer).attn
        if attn.qkv is None:
            whole = slice(None)
            return {"query": (attn.q_proj, whole), "value": (attn.v_proj, whole)}
        width = bare(attn.qkv).out_features // 3
        query, value = slice(0, width), slice(2 * width, 3 * width)
        return {"query": (attn.qkv, query), "value": (attn.qkv, value)}

    def project_attention(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        """Apply norm, gate and projection of the attention layer to the heads' outputs."""
        attn = self.block(layer).attn
        out = attn.norm(out_BND)
        if attn.gate is not None:
            out = out * attn.gate(x_BND).sigmoid()
        return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]

    def norm(self, x_BND: Tensor) -> Tensor:
        return self.vit.norm(x_BND)  # type: ignore[no-any-return]

    def classify(self, tokens: Tokens) -> Tensor:
        # As in ToMe's code, average pooling weights tokens by size. In attention pooling, the
        # log of the size is added to the attention logits (proportional attention).
        vit = self.vit
        x = self.norm(tokens.x)
        if tokens.size is None or (vit.attn_pool is None and vit.global_pool in ("token", "")):
            return vit.forward_head(x)  # type: ignore[no-any-return]
        size = tokens.size
        if not getattr(vit, "pool_include_prefix", vit.attn_pool is not None):
            x, size = x[:, tokens.prefix :], size[:, tokens.prefix :]
        if vit.attn_pool is not None:
            pooled = vit.attn_pool(x, attn_mask=size.log().to(x.dtype)[:, None, None, :])
        else:
            mean, largest = mean_by_size(x, size), x.amax(dim=1)
            pooled = {"avg": mean, "max": largest, "avgmax": 0.5 * (mean + largest)}[
                vit.global_pool
            ]
        return vit.head(vit.head_drop(vit.fc_norm(pooled)))  # type: ignore[no-any-return]


class TimmViT(TimmAnatomy):
    """timm's VisionTransformer, built of the standard pre-norm Block."""

    model_class = VisionTransformer
    block_classes = (Block,)
    attention_classes = (Attention,)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        vit = self.vit
        grid = self.grid(images_B3HW)
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images_B3HW)))
        return Tokens(x, vit.num_prefix_tokens, grid)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).norm1(x_BND)  # type: ignore[no-any-return]

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.block(layer).attn
        q, k, v = attn.qkv(x_BND).chunk(3, dim=-1)
        heads = (*x_BND.shape[:2], attn.num_heads, attn.head_dim)
        q, k, v = q.reshape(heads), k.reshape(heads), v.reshape(heads)
        return attn.q_norm(q.transpose(1, 2)), attn.k_norm(k.transpose(1, 2)), v.transpose(1, 2)

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        out = self.project_attention(layer, out_BND, x_BND)
        return block.drop_path1(block.ls1(out))  # type: ignore[no-any-return]

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).norm2(x_BND)  # type: ignore[no-any-return]

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return block.drop_path2(block.ls2(block.mlp(x_BND)))  # type: ignore[no-any-return]
