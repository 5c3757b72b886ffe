"""Video classification: every frame through the image model, then one query pools all tokens.

Source: Sparse-Tuning, https://arxiv.org/abs/2405.14700, experiments on Kinetics-400 and
Something-Something V2. The paper does not describe its head; this one has the published cost to the
last digit (142.53 G for eight frames through ViT-B/16).
"""

# Shape legend: B batch, T frames, N tokens, D embed_dim.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.backbones.anatomy import split_heads
from tokendial.vit import DialViT


class QueryPooling(nn.Module):
    """One learned query cross-attends to the tokens of all frames; then a linear head."""

    def __init__(self, embed_dim: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Logits [B, num_classes] from the normalised tokens of all frames of each clip."""
        query = self.q(self.norm_q(self.query)).expand(len(x_BND), -1, -1)
        keys, values = self.k(self.norm_k(x_BND)), self.v(self.norm_v(x_BND))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, keys, values))
        logits: Tensor = self.head(self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1)))
        return logits


class VideoViT(nn.Module):
    """A wrapped image model and the head that pools its frames; the dial is the image model's."""

    def __init__(self, model: DialViT, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.model = model
        self.pool = QueryPooling(model.anatomy.shape.embed_dim, num_classes, num_heads)

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Logits [B, num_classes] of clips, at the present degree of the image model."""
        for step in self.model.steps(clips_BT3HW.flatten(0, 1)):
            tokens = step.tokens
        x = self.model.anatomy.norm(tokens.x)
        return self.pool(x.reshape(len(clips_BT3HW), -1, x.shape[-1]))  # type: ignore[no-any-return]
