"""timm's Eva class: EVA, EVA-02, DINOv3, Perception Encoder and ViTs with rotary positions."""

# Shape legend: B batch, H heads, N tokens, L patch tokens, C head_dim, D embed_dim.

from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from tokendial.backbones.anatomy import split_heads
from tokendial.backbones.timm_vit import TimmAnatomy
from tokendial.tokens import Tokens


class TimmEva(TimmAnatomy):
    """Eva, pre- or post-norm; a token that absorbs others keeps its own rotary position."""

    model_class = Eva
    block_classes = (EvaBlock, EvaBlockPostNorm)
    attention_classes = (EvaAttention, AttentionRope)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        vit = self.vit
        grid = self.grid(images_B3HW)
        x, rope = vit._pos_embed(vit.patch_embed(images_B3HW))
        return Tokens(vit.norm_pre(x), vit.num_prefix_tokens, grid, rope=rope)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        block: Any = self.vit.blocks[layer - 1]
        return x_BND if isinstance(block, EvaBlockPostNorm) else block.norm1(x_BND)

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.vit.blocks[layer - 1].attn
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
            table = self._rotations(layer, tokens)
            q, k = (self._rotated(attn, part, table).type_as(v) for part in (q, k))
        if groups > 1:
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        return q, k, v

    def _rotations(self, layer: int, tokens: Tokens) -> Tensor:
        """Sines and cosines of every patch token, [L, *] or [B, 1 or H, L, *]."""
        table: Any = tokens.rope
        if self.vit.rope_mixed:
            table = table[layer - 1]
        if tokens.position is None:
            return table  # type: ignore[no-any-return]
        patches = tokens.position[:, tokens.prefix :] - tokens.prefix
        if self.vit.rope_mixed:
            return table[:, patches].transpose(0, 1)  # type: ignore[no-any-return]
        return table[patches].unsqueeze(1)  # type: ignore[no-any-return]

    @staticmethod
    def _rotated(attn: Any, x_BHNC: Tensor, table: Tensor) -> Tensor:
        prefix, patches = x_BHNC.tensor_split([attn.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(patches, table, half=attn.rotate_half)], 2)

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        block: Any = self.vit.blocks[layer - 1]
        out = block.attn.norm(out_BND)
        if block.attn.gate is not None:
            out = out * block.attn.gate(x_BND).sigmoid()
        out = block.attn.proj_drop(block.attn.proj(out))
        if isinstance(block, EvaBlockPostNorm):
            out = block.norm1(out)
        elif block.gamma_1 is not None:
            out = block.gamma_1 * out
        return block.drop_path1(out)  # type: ignore[no-any-return]

    def ffn(self, layer: int, x_BND: Tensor) -> Tensor:
        block: Any = self.vit.blocks[layer - 1]
        if isinstance(block, EvaBlockPostNorm):
            out = block.norm2(block.mlp(x_BND))
        else:
            out = block.mlp(block.norm2(x_BND))
            if block.gamma_2 is not None:
                out = block.gamma_2 * out
        return block.drop_path2(out)  # type: ignore[no-any-return]
