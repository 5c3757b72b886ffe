"""Self-attention of a timm block, with token sizes and the by-products that reducers ask for."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor


@dataclass(slots=True)
class Attended:
    """Output of one attention layer and what was read off on the way."""

    out: Tensor
    """[B, N, D] output after projection and dropout."""
    mean_keys: Tensor | None = None
    """[B, N, C] keys, mean over heads (the metric of ToMe)."""
    class_attention: Tensor | None = None
    """[B, N] attention of the first token to every token, mean over heads (the score of EViT)."""


def attend(
    layer: Attention,
    x_BND: Tensor,
    *,
    size_BN: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> Attended:
    """Run a timm attention layer, optionally weighting keys by token size.

    The layer's own modules are called (so adapters put into them by PEFT act), and the fused
    kernel of PyTorch computes the product; class attention costs one extra row, not a second pass.

    Args:
        layer: timm's `Attention`.
        x_BND: Normalised tokens.
        size_BN: Patches per token; the logarithm is added to the attention logits of the key
            (proportional attention). None: all tokens weigh the same.
        needs: Of "mean_keys", "class_attention": by-products to return.

    Returns:
        The output and the by-products asked for.

    Source:
        Proportional attention: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
        https://arxiv.org/abs/2210.09461, section 3. Class attention: Liang et al., EViT,
        ICLR 2022, https://arxiv.org/abs/2202.07800, section 3.2.
    """
    num_images, num_tokens, _ = x_BND.shape
    qkv = layer.qkv(x_BND).reshape(num_images, num_tokens, 3, layer.num_heads, layer.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = layer.q_norm(q), layer.k_norm(k)
    bias = None if size_BN is None else size_BN.log().to(q.dtype)[:, None, None, :]
    dropout = layer.attn_drop.p if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    out = layer.norm(out.transpose(1, 2).reshape(num_images, num_tokens, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x_BND).sigmoid()
    attended = Attended(layer.proj_drop(layer.proj(out)))
    if "mean_keys" in needs:
        attended.mean_keys = k.mean(dim=1)
    if "class_attention" in needs:
        logits_BH1N = (q[:, :, :1] * layer.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits_BH1N = logits_BH1N + bias
        attended.class_attention = logits_BH1N.softmax(dim=-1, dtype=torch.float32).mean(1)[:, 0]
    return attended
