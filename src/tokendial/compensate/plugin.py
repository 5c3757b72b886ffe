"""ToCom: small weights that bridge degrees of the dial, for any model fine-tuned from a backbone.

Source: Jie et al., "Token Compensator: Altering Inference Cost of Vision Transformer without
Re-Tuning", ECCV 2024, https://arxiv.org/abs/2408.06798, and the authors' code: group g bridges
degree g - 1 to g, by one low-rank pair on the queries and one on the values of each layer; in
training, dropout acts between the two halves of a pair.
"""

# Shape legend: B batch, N tokens, D embed_dim.

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.methods import register
from tokendial.reduce.base import ViTShape

Part = Literal["query", "value"]
_PARTS: tuple[Part, Part] = ("query", "value")


@register("compensate", "tocom")
@dataclass(frozen=True, kw_only=True)
class ToCom:
    """Settings of a compensator."""

    rank: int = 2
    """Rank of the pair of one step of the dial."""
    scale: float = 0.1
    """Factor on the difference, in training; at inference `Compensator.scale` may differ."""
    dropout: float = 0.1
    """Dropout between the halves of a pair, in training."""
    shared: bool = False
    """Ablation: one pair for all steps, added or subtracted."""
    inversion: bool = True
    """False: ablation, pairs of their own for steps down, instead of the negative of those up."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank}.")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.shared and not self.inversion:
            raise ValueError("inversion must be true with shared, got false.")

    def build(self, vit: ViTShape, steps: int) -> "Compensator":
        """Make the plugin for a dial of degrees 0 to `steps`.

        Raises:
            ValueError: If there is no step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        return Compensator(self, vit.depth, vit.embed_dim, steps)


class Compensator(nn.Module):
    """The plugin: 4 * depth * D * rank parameters for each step of the dial."""

    def __init__(self, config: ToCom, depth: int, embed_dim: int, steps: int) -> None:
        super().__init__()
        self.config, self.depth, self.embed_dim, self.steps = config, depth, embed_dim, steps
        self.scale = config.scale
        """Factor on the difference; the paper searches it for each model."""
        groups = 1 if config.shared else steps if config.inversion else 2 * steps
        wide = groups * config.rank
        for part in _PARTS:
            down = nn.ParameterList(torch.empty(wide, embed_dim) for _ in range(depth))
            up = nn.ParameterList(torch.zeros(embed_dim, wide) for _ in range(depth))
            for weight in down:
                nn.init.kaiming_uniform_(weight, a=5**0.5)
            self.register_module(f"{part}_down", down)
            self.register_module(f"{part}_up", up)

    def groups(self, source: int, target: int) -> tuple[slice, int]:
        """Which rows of the halves bridge two degrees, and their sign.

        Raises:
            ValueError: If a degree is not one that the plugin was made for.
        """
        for name, degree in (("source", source), ("target", target)):
            if type(degree) is not int or not 0 <= degree <= self.steps:
                raise ValueError(f"{name} must be an integer in [0, {self.steps}], got {degree!r}.")
        config = self.config
        sign = 1 if target >= source or not config.inversion else -1
        first, last = sorted((source, target))
        if config.shared:
            last = min(1, last - first)
            first = 0
        elif not config.inversion and target < source:
            first, last = first + self.steps, last + self.steps
        return slice(first * config.rank, last * config.rank), sign

    def halves(
        self, part: Part, layer: int, source: int, target: int
    ) -> tuple[Tensor, Tensor, float]:
        """The pair between two degrees in one layer (counted from 1).

        Returns:
            `down` [K, D], `up` [D, K] and the factor; the difference of the weights is
            `factor * up @ down`. K is 0 if the degrees are equal.
        """
        rows, sign = self.groups(source, target)
        down: Tensor = self.get_submodule(f"{part}_down")[layer - 1]  # type: ignore[index]
        up: Tensor = self.get_submodule(f"{part}_up")[layer - 1]  # type: ignore[index]
        return down[rows], up[:, rows], sign * self.scale

    def branch(self, part: Part, layer: int, source: int, target: int, x_BND: Tensor) -> Tensor:
        """What is added to queries or values computed from `x_BND`."""
        down, up, factor = self.halves(part, layer, source, target)
        hidden = F.dropout(F.linear(x_BND, down), self.config.dropout, self.training)
        return factor * F.linear(hidden, up)
