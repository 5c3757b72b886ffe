"""timm's Eva class: EVA, EVA-02, DINOv3, Perception Encoder and ViTs with rotary positions."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from functools import partial
from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from tokendial.backbones.anatomy import BlockInputs, split_heads
from tokendial.backbones.rotary import rotate_patches
from tokendial.backbones.timm_vit import TimmAnatomy
from tokendial.tokens import Tokens


class TimmEva(TimmAnatomy):
    """timm's Eva, pre- or post-norm. A token that absorbs others keeps its own rotary position."""

    model_class = Eva
    block_classes = (EvaBlock, EvaBlockPostNorm)
    attention_classes = (EvaAttention, AttentionRope)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        vit = self.vit
        if images_B3HW.shape[0] == 0:  # len() would fix the batch size of exported files
            return self.embed_none(images_B3HW)
        grid = self.grid(images_B3HW)
        x, rope = vit._pos_embed(vit.patch_embed(images_B3HW))
        return Tokens(vit.norm_pre(x), vit.num_prefix_tokens, grid, rope=rope)

    def read_call(self, *arguments: Any, rope: Tensor | None = None, **named: Any) -> BlockInputs:
        super().read_call(*arguments, **named)
        if rope is not None and self.vit.rope_mixed:  # each block has, and gets, its own table
            rope = rope.expand(len(self.blocks), *rope.shape)
        return BlockInputs(rope)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return x_BND if isinstance(block, EvaBlockPostNorm) else block.norm1(x_BND)

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.block(layer).attn
        if attn.qkv is None:
            q, k, v = attn.q_proj(x_BND), attn.k_proj(x_BND), attn.v_proj(x_BND)
        else:
            qkv = attn.qkv(x_BND)
            if getattr(attn, "q_bias", None) is not None:
                qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, v = qkv.chunk(3, dim=-1)
        groups = getattr(attn, "num_kv_groups", 1)
        q = attn.q_norm(split_heads(q, attn.num_heads))
        k = attn.k_norm(split_heads(k, attn.num_heads // groups))
        v = split_heads(v, attn.num_heads // groups)
        if tokens.rope is not None:
            # A mixed table has sines and cosines of its own for each layer and head.
            table = tokens.rope[layer - 1] if tokens.rope.ndim == 4 else tokens.rope
            rotate = partial(rotate_patches, tokens, table, half=attn.rotate_half)
            q, k = rotate(q).type_as(v), rotate(k).type_as(v)
        if groups > 1:
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        return q, k, v

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        out = self.project_attention(layer, out_BND, x_BND)
        if isinstance(block, EvaBlockPostNorm):
            out = block.norm1(out)
        elif block.gamma_1 is not None:
            out = block.gamma_1 * out
        return block.drop_path1(out)  # type: ignore[no-any-return]

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        return x_BND if isinstance(block, EvaBlockPostNorm) else block.norm2(x_BND)

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        block = self.block(layer)
        out = block.mlp(x_BND)
        if isinstance(block, EvaBlockPostNorm):
            out = block.norm2(out)
        elif block.gamma_2 is not None:
            out = block.gamma_2 * out
        return block.drop_path2(out)  # type: ignore[no-any-return]
