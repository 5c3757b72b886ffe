"""Scaled dot-product attention with token sizes, masks, and the by-products that reducers read."""

# Shape legend: B batch, H heads, N tokens (queries), M keys, C head_dim.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BY_PRODUCTS = frozenset({"mean_keys", "class_attention", "mean_attention", "attention"})
"""Names of the tensors that `attend` can return besides its output: the fields of `ByProducts`."""
_MAX_WEIGHTS = 2**22
"""Unfused attention holds at most this many attention weights at a time (at least one head's)."""
_MAX_TRAINED = 512
"""Unfused attention keeps every attention map for the backward pass. Above this number of tokens,
the maps take more memory than the rest of a training step."""


@dataclass(slots=True)
class ByProducts:
    """Tensors that attention computed besides its output; None where they were not requested."""

    mean_keys: Tensor | None = None
    """[B, N, C] keys, mean over heads (ToMe measures similarity on them)."""
    class_attention: Tensor | None = None
    """[B, N] attention of the first token to every token, mean over heads (the score of EViT)."""
    mean_attention: Tensor | None = None
    """[B, N] attention that every token receives, mean over heads and queries."""
    attention: Tensor | None = None
    """[B, H, N, N] the whole attention map; rows are queries."""
    shift: Tensor | None = None
    """[B, N] length of what the attention branch adds to each token. The block measures it."""
    attention_input: Tensor | None = None
    """[B, N, D] normalised tokens that attention reads. The block hands them over."""
    reduced: "ByProducts | None" = None
    """What is left of them after a reduction between attention and FFN, for a method that runs the
    FFN; set by `tokendial.Stack`."""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """How attention is computed. Every setting gives the same result up to rounding.

    Which one is fastest depends on the machine; `tokendial.optimize` measures it.
    """

    fused: bool | None = None
    """True: use PyTorch's `scaled_dot_product_attention`, which never holds a whole attention map.
    False: matrix products compute the maps, a limited number of them at a time. None: fused, except
    where its backward pass is slow: in half precision on a CPU, up to 512 tokens."""
    key_multiple: int = 1
    """Pad keys and values with masked rows until their number is a multiple of this one."""
    sizes_in_keys: bool = False
    """Put the logarithms of the token sizes into extra channels of the keys, so that no mask is
    needed. The fastest fused kernels of GPUs accept no mask."""


PYTORCH_KERNEL = AttentionKernel()
"""The default: mostly PyTorch's fused attention, with token sizes as a mask."""


def attend(
    q_BHNC: Tensor,
    k_BHMC: Tensor,
    v_BHMC: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    size_BM: Tensor | None = None,
    policy_BN: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    kernel: AttentionKernel = PYTORCH_KERNEL,
    of_tokens: bool = True,
) -> tuple[Tensor, ByProducts]:
    """Attention of every token to every token.

    Class attention costs one extra row, not a second pass.

    Args:
        q_BHNC: Queries.
        k_BHMC: Keys.
        v_BHMC: Values.
        scale: Factor on the dot products; None: 1 / sqrt(C).
        dropout: Probability of dropping an attention weight.
        size_BM: Number of patches that each token stands for. Its logarithm is added to the
            attention logits of the key (proportional attention). None: all tokens weigh the same.
        policy_BN: 1 for tokens that all tokens may attend to, 0 for tokens that only attend to
            themselves. None: all tokens attend to all. With a policy, `kernel` is ignored: no fused
            kernel can do this.
        needs: Which of `BY_PRODUCTS` to return.
        kernel: How to compute the output.
        of_tokens: Whether the queries are those of the tokens that have the keys. If not, a policy
            leaves no query a token of its own to attend to.

    Returns:
        Weighted values of all heads, [B, N, H * C], before the output projection; and the requested
        by-products.

    Source:
        Proportional attention: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
        https://arxiv.org/abs/2210.09461, section 3. Class attention: Liang et al., EViT,
        ICLR 2022, https://arxiv.org/abs/2202.07800, section 3.2. Policy: see `masked_softmax`.
    """
    scale = q_BHNC.shape[-1] ** -0.5 if scale is None else scale
    bias = None if size_BM is None else size_BM.log().to(q_BHNC.dtype)[:, None, None, :]
    if policy_BN is None:
        queries, keys, values, mask = q_BHNC, k_BHMC, v_BHMC, bias
        if kernel.sizes_in_keys and bias is not None:
            queries, keys, values = _with_sizes(q_BHNC, k_BHMC, v_BHMC, bias / scale)
            mask = None
        elif surplus := -k_BHMC.shape[2] % kernel.key_multiple:
            mask = k_BHMC.new_zeros(1, 1, 1, k_BHMC.shape[2]) if bias is None else bias
            mask = F.pad(mask, (0, surplus), value=-torch.inf)
            keys, values = (F.pad(each, (0, 0, 0, surplus)) for each in (k_BHMC, v_BHMC))
        fused = kernel.fused
        if fused is None:
            trains = queries.requires_grad or keys.requires_grad or values.requires_grad
            fused = not (trains and _has_slow_backward(queries, keys))
        if fused or dropout:
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        else:
            out = _unfused(queries, keys, values, mask, scale)
        out = out[..., : v_BHMC.shape[-1]]
    else:
        logits = (q_BHNC * scale) @ k_BHMC.transpose(-2, -1)
        weights = masked_softmax(
            logits if bias is None else logits + bias, policy_BN, of_tokens=of_tokens
        )
        out = F.dropout(weights, dropout).to(v_BHMC.dtype) @ v_BHMC
    attended = ByProducts()
    if "mean_keys" in needs:
        attended.mean_keys = k_BHMC.mean(dim=1)
    if "class_attention" in needs:
        attended.class_attention = _weights(q_BHNC[:, :, :1], k_BHMC, scale, bias).mean(1)[:, 0]
    if needs & {"mean_attention", "attention"}:
        weights = _weights(q_BHNC, k_BHMC, scale, bias)
        if "mean_attention" in needs:
            attended.mean_attention = weights.mean(dim=(1, 2))
        if "attention" in needs:
            attended.attention = weights
    return out.transpose(1, 2).flatten(2), attended


def _with_sizes(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, bias_B11M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose dot products include the bias of each key.

    One extra channel of a key holds its bias and meets a 1 in every query. The channels are padded
    by 8 in all, because fast kernels need their number to be a multiple of 8.
    """
    channels = 8
    bias_BHM1 = bias_B11M.transpose(-2, -1).expand(-1, k_BHMC.shape[1], -1, -1)
    keys = torch.cat([k_BHMC, F.pad(bias_BHM1, (0, channels - 1))], dim=-1)
    return F.pad(q_BHNC, (0, channels), value=1.0), keys, F.pad(v_BHMC, (0, channels))


def _has_slow_backward(q_BHNC: Tensor, k_BHMC: Tensor) -> bool:
    """Whether matrix products train faster than fused attention.

    On CPUs, PyTorch computes the backward pass of fused attention in half precision slowly: it is
    half of a training step of ViT-S with 65 tokens (docs/speed.md).
    """
    half = q_BHNC.dtype in (torch.bfloat16, torch.float16)
    few = max(q_BHNC.shape[2], k_BHMC.shape[2]) <= _MAX_TRAINED
    return half and few and q_BHNC.device.type == "cpu"


def _unfused(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, mask_B11M: Tensor | None, scale: float
) -> Tensor:
    """Attention by matrix products, [B, H, N, C]."""
    heads, num_tokens, num_keys = q_BHNC.shape[1], q_BHNC.shape[2], k_BHMC.shape[2]
    if mask_B11M is None:
        mask_B11M = q_BHNC.new_zeros(1, 1, 1, num_keys)
    masks = mask_B11M.expand(q_BHNC.shape[0], heads, 1, num_keys).flatten(0, 1)
    # Images and heads are one batch dimension, split so that few attention maps exist at a time.
    maps_at_a_time = max(1, _MAX_WEIGHTS // (num_tokens * num_keys))
    split = (
        torch.split(each, maps_at_a_time)
        for each in (masks, *(x.flatten(0, 1) for x in (q_BHNC, k_BHMC, v_BHMC)))
    )
    parts = [
        torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1) @ v
        for mask, q, k, v in zip(*split, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(q_BHNC.shape)


def masked_softmax(
    logits_BHNM: Tensor, policy_BM: Tensor, eps: float = 1e-6, *, of_tokens: bool = True
) -> Tensor:
    """Softmax over the keys that the policy keeps and, in each row, the token itself.

    The policy is multiplied in, so that gradients reach it. A mask of minus infinity on the logits
    would block them.

    Args:
        logits_BHNM: Scaled attention logits.
        policy_BM: 1 for kept tokens, 0 for dropped ones.
        eps: Weight that is spread evenly over all keys, so that no row sums to zero.
        of_tokens: Whether row n belongs to the token of key n. If not, the policy alone counts.

    Returns:
        [B, H, N, M] float32 attention weights.

    Source:
        Rao et al., "DynamicViT", NeurIPS 2021, https://arxiv.org/abs/2106.02034, equations 10 and
        11; the authors' code for `eps` and for the maximum over all keys.
    """
    num_keys = logits_BHNM.shape[-1]
    keep = policy_BM.float()[:, None, None, :]
    if of_tokens:
        keep = keep + (1.0 - keep) * torch.eye(num_keys, device=logits_BHNM.device)
    logits = logits_BHNM.float()
    exponential = (logits - logits.amax(dim=-1, keepdim=True)).exp() * keep
    total = exponential.sum(dim=-1, keepdim=True)
    return (exponential + eps / num_keys) / (total + eps)


def _weights(q_BHMC: Tensor, k_BHNC: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Float32 attention weights [B, H, M, N]."""
    logits = (q_BHMC * scale) @ k_BHNC.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1, dtype=torch.float32)
