"""Video models from image models: frames run one by one, then one query pools all their tokens.

Source: Sparse-Tuning, https://arxiv.org/abs/2405.14700, experiments on Kinetics-400 and
Something-Something V2, and the code of DyT, https://arxiv.org/abs/2403.11808. Eight frames through
ViT-B/16 cost 142.53 G, as published.
"""

# Shape legend: B clips, T frames, N tokens, D embed_dim.

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokendial.backbones.anatomy import split_heads
from tokendial.checks import check_count


class QueryPooling(nn.Module):
    """One learned query cross-attends to the tokens of all frames of a clip; then a linear head."""

    def __init__(self, embed_dim: int, num_classes: int, *, num_heads: int, frames: int) -> None:
        super().__init__()
        self.num_heads, self.frames = num_heads, frames
        self.query = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        # A key bias would shift all logits of a query equally, which the softmax ignores.
        self.k = nn.Linear(embed_dim, embed_dim, bias=False)
        self.head = nn.Linear(embed_dim, num_classes)

    @property
    def out_features(self) -> int:
        """Width of the logits."""
        return self.head.out_features

    def fresh(self, num_classes: int) -> "QueryPooling":
        """Return a newly initialised head of the same shape for other classes."""
        like = self.query
        new = QueryPooling(
            like.shape[-1], num_classes, num_heads=self.num_heads, frames=self.frames
        )
        return new.to(like.device, like.dtype)

    def forward(self, x_MND: Tensor, size_MN: Tensor | None = None) -> Tensor:
        """Return the logits [B, num_classes] of clips.

        Args:
            x_MND: Normalised tokens of M = B * T frames; the frames of a clip are consecutive.
            size_MN: Patches per token, by which the tokens are weighted.
        """
        x = x_MND.reshape(-1, self.frames * x_MND.shape[1], x_MND.shape[-1])
        bias = None
        if size_MN is not None:
            bias = size_MN.log().to(x.dtype).reshape(-1, 1, 1, x.shape[1])
        query = self.q(self.norm_q(self.query)).expand(x.shape[0], -1, -1)
        keys, values = self.k(self.norm_k(x)), self.v(self.norm_v(x))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, keys, values))
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(1)
        logits: Tensor = self.head(self.proj(pooled))
        return logits


def video_vit(vit: Any, *, frames: int = 8, num_classes: int) -> Any:
    """Turn an image model into a video model: a new head pools the tokens of all frames.

    Args:
        vit: A timm VisionTransformer. It is changed in place, and its head is replaced.
        frames: Frames per clip.
        num_classes: Classes of the new head.

    Returns:
        `vit`, which takes [B * frames, 3, H, W]; wrapped by `wrap`, clips [B, frames, 3, H, W].

    Raises:
        ValueError: If the model is of another kind, or normalises its tokens only after pooling.

    Example:
        >>> import timm, torch, tokendial as td
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = td.wrap(td.video_vit(vit, frames=4, num_classes=5), reduce=td.ToMe(r=8))
        >>> model(torch.zeros(2, 4, 3, 224, 224)).shape
        torch.Size([2, 5])
    """
    if type(vit) is not VisionTransformer or vit.attn_pool is not None:
        raise ValueError("vit must be a timm VisionTransformer without attention pooling.")
    if not isinstance(vit.fc_norm, nn.Identity):
        raise ValueError("vit normalises after pooling: create it with global_pool=''.")
    for name, value in (("frames", frames), ("num_classes", num_classes)):
        check_count(name, value)
    heads = vit.blocks[0].attn.num_heads
    like = next(vit.parameters())
    vit.head = QueryPooling(vit.embed_dim, num_classes, num_heads=heads, frames=frames).to(
        like.device, like.dtype
    )
    vit.global_pool, vit.num_classes = "", num_classes
    return vit


def new_head(head: nn.Module, num_classes: int) -> nn.Module:
    """Return a newly initialised classification head of the same kind for other classes."""
    if isinstance(head, QueryPooling):
        return head.fresh(num_classes)
    like = head.get_parameter("weight")
    fresh = nn.Linear(like.shape[1], num_classes, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(fresh.weight, std=0.02)
    nn.init.zeros_(fresh.bias)
    return fresh
