"""Choosing, in each layer, which tokens the FFN processes; the others pass by.

What DyT and DAR have in common: one logit per patch token, a hard mask drawn with Gumbel noise in
training, and at inference an FFN that runs on the selected tokens of the whole batch, packed.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim, K selected tokens.

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokendial.attention import Attended
from tokendial.reduce.base import (
    Outcome,
    Reducer,
    ReducerConfig,
    ViTShape,
    best_tokens,
    check_choice,
    check_share,
    dial_of,
    num_kept_tokens,
)
from tokendial.tokens import Grouping, Tokens


@dataclass(frozen=True, kw_only=True)
class SelectConfig(ReducerConfig):
    """Settings that DyT and DAR share."""

    target_ratio: float = 0.5
    """Share of the patch tokens that the FFN shall process, in (0, 1]."""
    ratio_weight: float = 2.0
    """Weight of the loss that keeps the share at its target."""
    selection: Literal["threshold", "topk"] = "threshold"
    """At inference: the tokens with a logit above 0, as published (their number depends on the
    image); or the best of each image, exactly the share that the dial says."""

    def __post_init__(self) -> None:
        check_share("target_ratio", self.target_ratio)
        check_choice("selection", self.selection, ("threshold", "topk"))
        if not self.ratio_weight >= 0:
            raise ValueError(f"ratio_weight must be at least 0, got {self.ratio_weight}.")


class Selector(Reducer):
    """Runs the FFN of every layer on the selected tokens.

    Degrees by threshold: 0 (every token) and 1 (as trained). By top-k: the position in the list of
    shares 1, 0.9, ... 0.1, into which the target is sorted. By threshold the number of tokens
    depends on values, which torch.compile traces as an unknown size; by top-k every size is known.
    Costs by threshold are those of the target share.
    """

    keeps_grid = True
    temperature = 5.0
    """Of the sigmoid in training."""

    def __init__(self, config: SelectConfig, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.rates: tuple[float, ...] = (1.0, config.target_ratio)
        self.degree = 1
        if config.selection == "topk":
            self.rates, self.degree = dial_of(config.target_ratio)
        self.degrees = tuple(range(len(self.rates)))

    @abstractmethod
    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """Logit of each patch token, [B, L]; above 0: the FFN processes it."""

    def acts(self, layer: int, degree: int) -> bool:
        """In every layer."""
        return True

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: Attended,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Skip the FFN for tokens that are not selected; prefix tokens always are."""
        logits_BL = self.logits(layer, tokens)
        always = logits_BL.new_ones(len(logits_BL), tokens.prefix)
        if self.training:
            chosen = gumbel_sigmoid(logits_BL, self.temperature)
            mask_BN = torch.cat([always, chosen], dim=1)
            return mask_BN.to(tokens.x.dtype).unsqueeze(-1) * ffn(tokens.x), mask_BN
        # Without values, on the meta device, the cost is that of the target.
        if self.config.selection == "topk" or logits_BL.is_meta:
            count = num_kept_tokens(logits_BL.shape[1], self.rates[degree])
            return _run_on_best(ffn, tokens, logits_BL, count)
        mask_BN = torch.cat([always, (logits_BL > 0).to(always.dtype)], dim=1)
        return run_on_selected(ffn, tokens.x, mask_BN > 0), mask_BN


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Hard 0/1 decisions drawn with Gumbel noise; the gradient is that of the soft ones.

    Source:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017,
        https://arxiv.org/abs/1611.01144, for two categories.
    """
    soft = ((logits + logistic_noise(logits)) / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def logistic_noise(like: Tensor) -> Tensor:
    """Difference of two Gumbel draws, in the shape of `like`."""
    first, second = (torch.empty_like(like).exponential_().log() for _ in range(2))
    return second - first


def run_on_selected(ffn: Callable[[Tensor], Tensor], x_BND: Tensor, selected_BN: Tensor) -> Tensor:
    """Run `ffn` on the selected tokens of all images, packed into [K, D]; zeros elsewhere."""
    flat = x_BND.flatten(0, 1)
    index = selected_BN.flatten().nonzero().squeeze(1)
    out = ffn(flat[index])
    return out.new_zeros(flat.shape).index_copy(0, index, out).view(x_BND.shape)


def _run_on_best(
    ffn: Callable[[Tensor], Tensor], tokens: Tokens, logits_BL: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Run `ffn` on the prefix and the `count` best patch tokens of each image."""
    num_tokens = tokens.x.shape[1]
    grouping = Grouping.keeping(best_tokens(logits_BL, count, tokens.prefix), num_tokens)
    out = grouping.unmerge(ffn(grouping.merge(tokens.x)))
    return out, (grouping.index >= 0).to(tokens.x.dtype)


def selected_patches(outcome: Outcome) -> Tensor:
    """Decisions on the patch tokens of every layer, [B, depth, L].

    Raises:
        ValueError: If the pass made none: it ran at degree 0.
    """
    if any(tokens.selected is None for tokens in outcome.tokens):
        raise ValueError("no tokens were selected: degree must be at least 1 in training, got 0.")
    masks = [t.selected[:, t.prefix :] for t in outcome.tokens if t.selected is not None]
    return torch.stack(masks, dim=1)
