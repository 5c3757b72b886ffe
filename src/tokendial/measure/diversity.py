"""Diversity of attention by depth: how different the tokens' views of the image are.

Source: the argument of "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for
Pixel-Level Tasks", CVPR 2025: reducing tokens makes attention patterns alike, which hurts dense
prediction. The paper's own measure is not at hand; these two are standard: total variation distance
between attention rows, and effective rank (Roy and Vetterli, "The Effective Rank", EUSIPCO 2007).
"""

# Shape legend: B batch, H heads, N tokens (queries and keys).

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerDiversity:
    """Attention of one layer, mean over heads and images."""

    layer: int
    """The block, counted from 1."""
    num_tokens: int
    """Tokens that attend, prefix included."""
    distance: float
    """Mean distance between two tokens' attention rows, from 0 (all alike) to 1 (disjoint)."""
    effective_rank: float
    """How many independent rows there are, from 1 to `num_tokens`."""


class _Stepwise(Protocol):
    def steps(self, images: Tensor, *, needs: frozenset[str]) -> Iterable[Any]: ...


def attention_diversity(model: nn.Module, images: Tensor) -> list[LayerDiversity]:
    """Measure every layer of a wrapped model at its present degree.

    Args:
        model: A `DialViT`; put into evaluation mode while it runs.
        images: [B, 3, H, W], normalised.
    """
    training = model.training
    model.eval()
    stepwise: _Stepwise = model  # type: ignore[assignment]  # a DialViT, which lives above
    layers = []
    with torch.no_grad():
        for step in stepwise.steps(images, needs=frozenset({"attention"})):
            attention = step.attended.attention
            layers.append(
                LayerDiversity(
                    layer=step.layer,
                    num_tokens=attention.shape[-1],
                    distance=row_distance(attention).mean().item(),
                    effective_rank=effective_rank(attention).mean().item(),
                )
            )
    model.train(training)
    return layers


def row_distance(attention_BHNN: Tensor) -> Tensor:
    """Mean total variation distance between two different rows, [B, H]; 0 for one row."""
    count = attention_BHNN.shape[-1]
    pairs = max(1, count * (count - 1))
    rows = attention_BHNN.float()
    # One head at a time: all of them together would take N * N * N numbers each.
    sums = [torch.cdist(head, head, p=1.0).sum(dim=(-2, -1)) for head in rows.unbind(1)]
    return 0.5 * torch.stack(sums, dim=1) / pairs


def effective_rank(attention_BHNN: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values, [B, H]."""
    values = torch.linalg.svdvals(attention_BHNN.float())
    shares = values / values.sum(dim=-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy.exp()
