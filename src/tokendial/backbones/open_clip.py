"""open_clip's own VisionTransformer: the image tower of its CLIP and CoCa models.

The timm towers of open_clip (`TimmModel`) hold an ordinary timm model as `trunk`, which is wrapped
like any other.
"""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy, mean_by_size, split_heads
from tokendial.backbones.in_projection import InProjection
from tokendial.backbones.positions import resize_positions
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class OpenClipViT(Anatomy):
    """open_clip's VisionTransformer, built of its ResidualAttentionBlock."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self._in_projections = [InProjection(self.block(n).attn) for n in self._layers()]

    @classmethod
    def owns(cls, vit: nn.Module) -> bool:
        """Whether `vit` is of a class of open_clip, found without importing that package."""
        return type(vit).__module__.startswith("open_clip.")

    @classmethod
    def recognises(cls, vit: nn.Module) -> bool:
        return cls.owns(vit) and type(vit).__name__ == "VisionTransformer"

    @classmethod
    def problem(cls, vit: Any) -> str | None:
        name = type(vit).__name__
        if name == "TimmModel":
            return (
                "TimmModel of open_clip holds a model of timm: wrap its `trunk`, or use td.attach, "
                "which keeps its projection"
            )
        if name in ("CLIP", "CoCa", "CustomTextCLIP"):
            return f"{name} of open_clip also has a text tower: wrap its `visual`"
        if not cls.recognises(vit):
            return f"{name} is of another class"
        for block in vit.transformer.resblocks:
            if type(block).__name__ != "ResidualAttentionBlock":
                return f"its blocks are {type(block).__name__}"
            if type(block.attn) is not nn.MultiheadAttention:
                return f"its attention layers are {type(block.attn).__name__}"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.vit.transformer.resblocks  # type: ignore[no-any-return]

    def _in_projection(self, layer: int) -> InProjection:
        if self._replica is not None:
            return InProjection(self.block(layer).attn)
        return self._in_projections[layer - 1]

    def _layers(self) -> range:
        return range(1, len(self.blocks) + 1)

    @property
    def shape(self) -> ViTShape:
        rows, columns = self.vit.grid_size
        return ViTShape(
            depth=len(self.blocks),
            embed_dim=self.vit.transformer.width,
            num_prefix_tokens=1,
            num_patches=rows * columns,
            has_class_token=True,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.vit.image_size
        return height, width

    @property
    def in_chans(self) -> int:
        return int(self.vit.conv1.in_channels)

    @property
    def patch_convolution(self) -> nn.Module:
        return self.vit.conv1  # type: ignore[no-any-return]

    @property
    def heads(self) -> list[nn.Module]:
        return []  # the projection into the space of the texts is a parameter of the tower

    @property
    def head_reads_prefix_only(self) -> bool:
        return self.vit.attn_pool is None and self.vit.pool_type == "tok"

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # open_clip's factory stores them in the tower.
        mean = getattr(self.vit, "image_mean", None) or OPENAI_CLIP_MEAN
        std = getattr(self.vit, "image_std", None) or OPENAI_CLIP_STD
        return tuple(mean), tuple(std)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        vit = self.vit
        if vit.training and getattr(vit.patch_dropout, "prob", 0.0) > 0:
            raise ValueError(
                f"patch_dropout must be 0 to train under the dial, got {vit.patch_dropout.prob}: "
                "create the model with force_patch_dropout=0."
            )
        grid = self._grid(images_B3HW)
        patches = vit.conv1(images_B3HW).flatten(2).transpose(1, 2)
        first = vit.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        positions = vit.positional_embedding
        if grid != tuple(vit.grid_size):
            # As open_clip resizes them when it loads weights for another image size.
            positions = resize_positions(positions.unsqueeze(0), grid)[0]
        x = torch.cat([first, patches], dim=1) + positions.to(patches.dtype)
        return Tokens(vit.ln_pre(x), 1, grid)

    def _grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches; raise a ValueError if the image size does not fit."""
        height, width = images_B3HW.shape[-2:]
        patch, own = self.vit.patch_size, self.image_size
        if (height, width) == own:
            rows, columns = self.vit.grid_size
            return rows, columns
        if own[0] != own[1] or patch[0] != patch[1]:
            raise ValueError(f"images must be {own[0]}x{own[1]}, got {height}x{width}.")
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f"images must have sides divisible by the patch size {patch[0]}x{patch[1]}, "
                f"got {height}x{width}."
            )
        return height // patch[0], width // patch[1]

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).ln_1(x_BND)  # type: ignore[no-any-return]

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.block(layer).attn.num_heads
        parts = self._in_projection(layer)(x_BND).chunk(3, dim=-1)
        q, k, v = (split_heads(part, heads) for part in parts)
        return q, k, v

    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        projection, width = self._in_projection(layer), self.vit.transformer.width
        query, value = slice(0, width), slice(2 * width, 3 * width)
        return {"query": (projection, query), "value": (projection, value)}

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return block.ls_1(block.attn.out_proj(out_BND))  # type: ignore[no-any-return]

    def attention_settings(self, layer: int) -> tuple[float, float]:
        attn = self.block(layer).attn
        return attn.head_dim**-0.5, attn.dropout if attn.training else 0.0

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self.block(layer).ln_2(x_BND)  # type: ignore[no-any-return]

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return block.ls_2(block.mlp(x_BND))  # type: ignore[no-any-return]

    def norm(self, x_BND: Tensor) -> Tensor:
        vit = self.vit
        # With attentional pooling, or the norm after the pooling, tokens have no norm of their own.
        pools_first = vit.final_ln_after_pool
        if vit.attn_pool is not None:
            pools_first = vit.attn_pool_contrastive is None
        return x_BND if pools_first else vit.ln_post(x_BND)

    def classify(self, tokens: Tokens) -> Tensor:
        """Embedding of the image, which `encode_image` gives before it normalises it.

        With `pool_type` "none" there is one for each token that is left.
        """
        vit, size = self.vit, tokens.size
        x = self.norm(tokens.x)
        if vit.attn_pool is None:
            pooled = self._pool(x, size)
            if vit.final_ln_after_pool:
                pooled = vit.ln_post(pooled)
        elif vit.attn_pool_contrastive is None:
            pooled = self._pool(vit.ln_post(_attend_all(vit.attn_pool, x, size)), None)
        elif vit.attn_pool_type == "parallel":
            pooled = _attend_all(vit.attn_pool_contrastive, x, size)
        else:
            pooled = _attend_all(vit.attn_pool_contrastive, _attend_all(vit.attn_pool, x, size))
        return pooled if vit.proj is None else pooled @ vit.proj

    def _pool(self, x_BND: Tensor, size_BN: Tensor | None) -> Tensor:
        if self.vit.pool_type == "tok":
            return x_BND[:, 0]
        if self.vit.pool_type == "avg":
            return mean_by_size(x_BND[:, 1:], None if size_BN is None else size_BN[:, 1:])
        return x_BND


def _attend_all(pooler: Any, x_BND: Tensor, size_BN: Tensor | None = None) -> Tensor:
    """Output of an AttentionalPooler, whose attention weighs tokens by their size."""
    bias = None if size_BN is None else size_BN.log().to(x_BND.dtype)
    keys = pooler.ln_k(x_BND)
    queries = pooler.ln_q(pooler.query).expand(x_BND.shape[0], -1, -1)
    out: Tensor = pooler.attn(queries, keys, keys, need_weights=False, key_padding_mask=bias)[0]
    return out
