"""Scaled dot-product attention with token sizes, masks, and the by-products that reducers read."""

# Shape legend: B batch, H heads, N tokens, C head_dim.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BY_PRODUCTS = frozenset({"mean_keys", "class_attention", "mean_attention", "attention"})
"""What `attend` can return besides the output."""
_MOST_WEIGHTS = 2**22
"""Attention weights that are held at a time, or those of one head."""


@dataclass(slots=True)
class ByProducts:
    """By-products of one attention layer, those that were asked for."""

    mean_keys: Tensor | None = None
    """[B, N, C] keys, mean over heads (the metric of ToMe)."""
    class_attention: Tensor | None = None
    """[B, N] attention of the first token to every token, mean over heads (the score of EViT)."""
    mean_attention: Tensor | None = None
    """[B, N] attention that every token receives, mean over heads and queries."""
    attention: Tensor | None = None
    """[B, H, N, N] the whole attention map; rows are queries."""


def attend(
    q_BHNC: Tensor,
    k_BHNC: Tensor,
    v_BHNC: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    size_BN: Tensor | None = None,
    policy_BN: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    fused: bool = True,
    key_multiple: int = 1,
    sizes_in_keys: bool = False,
) -> tuple[Tensor, ByProducts]:
    """Attention of every token to every token.

    Class attention costs one extra row, not a second pass.

    Args:
        q_BHNC: Queries.
        k_BHNC: Keys.
        v_BHNC: Values.
        scale: Factor on the dot products; None: 1 / sqrt(C).
        dropout: Probability of dropping an attention weight.
        size_BN: Patches per token; the logarithm is added to the attention logits of the key
            (proportional attention). None: all tokens weigh the same.
        policy_BN: 1 for tokens that others may see, 0 for those that only see themselves. None:
            all are seen.
        needs: Which of `BY_PRODUCTS` to return.
        fused: Let the fused kernel of PyTorch compute it, which never holds a whole attention map;
            else matrix products do, some maps at a time. Some processors run these faster. With a
            policy there is no fused kernel.
        key_multiple: Attention gets keys and values for a multiple of so many tokens, the surplus
            masked out: some processors run that faster. The result is the same.
        sizes_in_keys: Token sizes become channels of the keys, so that the fused kernel needs no
            mask: the fastest ones of GPUs take none. The result is the same.

    Returns:
        Weighted values of all heads, [B, N, H * C], before the output projection; and the
        by-products asked for.

    Source:
        Proportional attention: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
        https://arxiv.org/abs/2210.09461, section 3. Class attention: Liang et al., EViT,
        ICLR 2022, https://arxiv.org/abs/2202.07800, section 3.2. Policy: see `masked_softmax`.
    """
    scale = q_BHNC.shape[-1] ** -0.5 if scale is None else scale
    bias = None if size_BN is None else size_BN.log().to(q_BHNC.dtype)[:, None, None, :]
    if policy_BN is None:
        queries, keys, values, mask = q_BHNC, k_BHNC, v_BHNC, bias
        if sizes_in_keys and bias is not None:
            queries, keys, values = _with_sizes(q_BHNC, k_BHNC, v_BHNC, bias / scale)
            mask = None
        elif surplus := -k_BHNC.shape[2] % key_multiple:
            mask = k_BHNC.new_zeros(1, 1, 1, k_BHNC.shape[2]) if bias is None else bias
            mask = F.pad(mask, (0, surplus), value=-torch.inf)
            keys, values = (F.pad(each, (0, 0, 0, surplus)) for each in (k_BHNC, v_BHNC))
        if fused or dropout:
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        else:
            out = _unfused(queries, keys, values, mask, scale)
        out = out[..., : v_BHNC.shape[-1]]
    else:
        logits = (q_BHNC * scale) @ k_BHNC.transpose(-2, -1)
        weights = masked_softmax(logits if bias is None else logits + bias, policy_BN)
        out = F.dropout(weights, dropout).to(v_BHNC.dtype) @ v_BHNC
    attended = ByProducts()
    if "mean_keys" in needs:
        attended.mean_keys = k_BHNC.mean(dim=1)
    if "class_attention" in needs:
        attended.class_attention = _weights(q_BHNC[:, :, :1], k_BHNC, scale, bias).mean(1)[:, 0]
    if needs & {"mean_attention", "attention"}:
        weights = _weights(q_BHNC, k_BHNC, scale, bias)
        if "mean_attention" in needs:
            attended.mean_attention = weights.mean(dim=(1, 2))
        if "attention" in needs:
            attended.attention = weights
    return out.transpose(1, 2).flatten(2), attended


def _with_sizes(
    q_BHNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor, bias_B11N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose dot products have the bias of each key in them."""
    channels = 8  # fast kernels want their number to stay a multiple of this
    bias_BHN1 = bias_B11N.transpose(-2, -1).expand(-1, k_BHNC.shape[1], -1, -1)
    keys = torch.cat([k_BHNC, F.pad(bias_BHN1, (0, channels - 1))], dim=-1)
    return F.pad(q_BHNC, (0, channels), value=1.0), keys, F.pad(v_BHNC, (0, channels))


def _unfused(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, mask_B11M: Tensor | None, scale: float
) -> Tensor:
    """Attention by matrix products, [B, H, N, C]."""
    heads, num_tokens, num_keys = q_BHNC.shape[1], q_BHNC.shape[2], k_BHMC.shape[2]
    if mask_B11M is None:
        mask_B11M = q_BHNC.new_zeros(1, 1, 1, num_keys)
    masks = mask_B11M.expand(q_BHNC.shape[0], heads, 1, num_keys).flatten(0, 1)
    some = max(1, _MOST_WEIGHTS // (num_tokens * num_keys))
    split = (
        torch.split(each, some)
        for each in (masks, *(x.flatten(0, 1) for x in (q_BHNC, k_BHMC, v_BHMC)))
    )
    parts = [
        torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1) @ v
        for mask, q, k, v in zip(*split, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(q_BHNC.shape)


def masked_softmax(logits_BHNN: Tensor, policy_BN: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the keys that the policy keeps and, in each row, the token itself.

    The gradient reaches the policy, which a hard mask on the logits would not let through.

    Args:
        logits_BHNN: Scaled attention logits.
        policy_BN: 1 for kept tokens, 0 for dropped ones.
        eps: Spread evenly over all keys, so that no row is empty.

    Returns:
        [B, H, N, N] float32 attention weights.

    Source:
        Rao et al., "DynamicViT", NeurIPS 2021, https://arxiv.org/abs/2106.02034, equations 10 and
        11; the authors' code for `eps` and for the maximum over all keys.
    """
    num_tokens = logits_BHNN.shape[-1]
    itself = torch.eye(num_tokens, device=logits_BHNN.device)
    keep_BN = policy_BN.float()[:, None, None, :]
    keep = keep_BN + (1.0 - keep_BN) * itself
    logits = logits_BHNN.float()
    exponential = (logits - logits.amax(dim=-1, keepdim=True)).exp() * keep
    total = exponential.sum(dim=-1, keepdim=True)
    return (exponential + eps / num_tokens) / (total + eps)


def _weights(q_BHMC: Tensor, k_BHNC: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Float32 attention weights [B, H, M, N]."""
    logits = (q_BHMC * scale) @ k_BHNC.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1, dtype=torch.float32)
