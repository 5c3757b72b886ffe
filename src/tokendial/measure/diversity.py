"""Diversity of attention in each layer: how much the attention rows of the tokens differ.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, argues that token reduction makes attention rows similar, which hurts dense
prediction. Departure: the paper's own measure is not published, so two standard measures stand
here: the total variation distance between attention rows, and the effective rank (Roy and Vetterli,
"The Effective Rank", EUSIPCO 2007).
"""

# Shape legend: B batch, H heads, N tokens (queries and keys).

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerDiversity:
    """Diversity of the attention of one layer, mean over heads and images."""

    layer: int
    """Number of the block, counted from 1."""
    num_tokens: int
    """Number of tokens in the attention, prefix tokens included."""
    distance: float
    """Mean total variation distance between two attention rows, from 0 (all rows are equal) to 1
    (no two rows attend to the same token)."""
    effective_rank: float
    """Effective rank of the attention matrix, from 1 (all rows are equal) to `num_tokens`."""


class _RunsStepByStep(Protocol):
    def steps(self, images: Tensor, *, needs: frozenset[str]) -> Iterable[Any]: ...


def attention_diversity(model: nn.Module, images: Tensor) -> list[LayerDiversity]:
    """Measure the diversity of attention in each layer of a model at its present degree.

    Args:
        model: A `DialViT`. It runs in evaluation mode.
        images: Normalised images [B, 3, H, W].
    """
    training = model.training
    model.eval()
    stepwise: _RunsStepByStep = model  # type: ignore[assignment]  # a DialViT, which lives above
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
    """Mean total variation distance between two rows, [B, H]; 0 if there is one row."""
    count = attention_BHNN.shape[-1]
    pairs = max(1, count * (count - 1))
    rows = attention_BHNN.float()
    # One head at a time, because cdist of all heads together needs N * N * N numbers for each.
    sums = [torch.cdist(head, head, p=1.0).sum(dim=(-2, -1)) for head in rows.unbind(1)]
    return 0.5 * torch.stack(sums, dim=1) / pairs


def effective_rank(attention_BHNN: Tensor) -> Tensor:
    """Effective rank, [B, H]: the exponential of the entropy of the normalised singular values."""
    values = torch.linalg.svdvals(attention_BHNN.float())
    shares = values / values.sum(dim=-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy.exp()
