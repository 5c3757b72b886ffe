"""PruneMerge: drop the tokens of least attention, merge the next ones into those that stay.

Source: Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
ICCV 2023, https://arxiv.org/abs/2305.17997, and outputs of the authors' code for one step: order,
unweighted means, and sizes weighted by similarity. Their schedules were learnt with gradients;
`td.fit` searches schedules without labels.

Departures: any number of prefix tokens is kept. A similarity below 0 counts as 0, because a size
below 0 has no logarithm. In backbones without a class token, tokens can be scored by the mean
attention that they receive from all tokens.
"""

# Shape legend: B batch, N tokens (prefix + patch), D embed_dim, L patch tokens.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_choice
from tokendial.methods import register
from tokendial.reduce.base import SCORES, Reducer, best_tokens, check_score, token_scores
from tokendial.reduce.diffrate_schedules import PUBLISHED
from tokendial.reduce.schedules import (
    PerLayer,
    ScheduledConfig,
    freeze_removal,
    make_removal_dial,
    patches_after_layers,
)
from tokendial.reduce.tome import best_partners, in_float32
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens, take

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of `prune_share` that a fit compares with the given one."""


@register("reduce", "prune_merge")
@dataclass(frozen=True, kw_only=True)
class PruneMerge(ScheduledConfig):
    """PruneMerge: in each layer, drop the least attended tokens and merge the next ones."""

    r: int | Sequence[int | float] | Sequence[Sequence[int | float]] = 8
    """Tokens that each layer removes: one number for all layers; a list with one number per layer
    (missing last layers remove none); or a list of such lists, one for each degree from 1 up, from
    the most to the least expensive. In a list, a float is a share of the image's patches."""
    prune_share: float | Sequence[float] = 0.5
    """Share of the removed tokens that is dropped, in [0, 1], rounded down to whole tokens: one for
    all layers, or a list with one per layer (missing last layers drop none). The others are merged
    into the most similar token that stays."""
    pruned: Sequence[int] | None = None
    """Instead of `prune_share`: tokens that each layer drops, at most as many as it removes. `r`
    must be a list with one number per layer then."""
    score: Literal["class", "mean", "shift"] = "class"
    """What ranks the tokens: "class", "mean" or "shift", as in `EViT`."""
    proportional_attention: bool = True
    """Whether attention adds the logarithm of the token sizes to its logits."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", freeze_removal(self.r))
        shares: Any = self.prune_share  # as the user wrote it
        each_share = shares if isinstance(shares, list | tuple) and shares else [shares]
        if not all(type(one) in (int, float) and 0.0 <= one <= 1.0 for one in each_share):
            raise ValueError(
                "prune_share must lie in [0, 1], or be a list of such numbers, one per layer, got "
                f"{shares!r}."
            )
        if isinstance(shares, list | tuple):
            object.__setattr__(self, "prune_share", PerLayer(map(float, shares)))
        if self.pruned is not None:
            pruned = freeze_removal(self.pruned)
            if not (isinstance(pruned, PerLayer) and isinstance(self.r, PerLayer)) or any(
                isinstance(each, float) for each in (*pruned, *self.r)
            ):
                raise ValueError(
                    "pruned must be a list of integers, and so must r, got "
                    f"pruned={self.pruned!r} and r={self.r!r}."
                )
            if len(pruned) > len(self.r) or any(
                drop > all_of_them for drop, all_of_them in zip(pruned, self.r, strict=False)
            ):
                raise ValueError(
                    f"pruned must be at most r in each layer, got {pruned!r} and r={self.r!r}."
                )
            object.__setattr__(self, "pruned", pruned)
        check_choice("score", self.score, tuple(SCORES))

    @classmethod
    def published(cls, model: str, gmacs: float) -> "PruneMerge":
        """A schedule that the authors of DiffRate published.

        Args:
            model: Model that it was learnt for, such as "deit_small".
            gmacs: Its cost in 1e9 multiply-accumulates for an image, as published.

        Raises:
            ValueError: If there is none.
        """
        check_choice("model", model, tuple(PUBLISHED))
        check_choice("gmacs", gmacs, tuple(PUBLISHED[model]))
        return cls.from_kept(*PUBLISHED[model][gmacs])

    @classmethod
    def from_kept(cls, prune_kept: Sequence[int], merge_kept: Sequence[int]) -> "PruneMerge":
        """A schedule in DiffRate's form.

        Args:
            prune_kept: Tokens left in each layer after pruning, the class token counted. As many
                as the first number enter the first layer.
            merge_kept: Tokens left after merging as well. As in the authors' code, a number above
                that of the tokens that are there keeps them all.

        Raises:
            ValueError: If the lists differ in length, or a number is below 2.
        """
        if len(prune_kept) != len(merge_kept) or min(*prune_kept, *merge_kept) < 2:
            raise ValueError(
                "prune_kept and merge_kept must have one number of at least 2 for each layer, got "
                f"{list(prune_kept)} and {list(merge_kept)}."
            )
        removed, pruned, now = [], [], prune_kept[0]
        for after_pruning, after_merging in zip(prune_kept, merge_kept, strict=True):
            left = min(now, after_pruning, after_merging)
            pruned.append(now - min(now, after_pruning))
            removed.append(now - left)
            now = left
        return cls(r=removed, pruned=pruned)

    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can remove: all but one."""
        return max(0, num_patches - 1)

    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> "PruneMerge":
        """The same method with these schedules as its degrees 1, 2, ...

        Of what a layer removes, the same share is dropped as before. Where `pruned` says how many
        are dropped, a layer that removed nothing gets the share of all layers together.
        """
        share = self.prune_share
        if self.pruned is not None:
            assert isinstance(self.r, PerLayer)
            depth = max(len(self.r), *map(len, schedules))
            removed, dropped = (
                [*counts, *[0] * (depth - len(counts))] for counts in (self.r, self.pruned)
            )
            overall = sum(dropped) / max(1, sum(removed))
            share = [d / r if r else overall for d, r in zip(dropped, removed, strict=True)]
        return replace(self, r=[list(each) for each in schedules], prune_share=share, pruned=None)

    def variants(self) -> dict[str, "PruneMerge"]:
        """The method with other shares of the removed tokens that are dropped."""
        return {
            f"prune_share {share:g}": replace(self, prune_share=share, pruned=None)
            for share in _SHARES
            if share != self.prune_share or self.pruned is not None
        }

    def build(self, vit: ViTShape) -> "PruneMergeReducer":
        """Make the module.

        Raises:
            ValueError: If the backbone has no class token for the score, or lists do not fit, see
                `make_schedule_dial`.
        """
        return PruneMergeReducer(self, vit)


class PruneMergeReducer(Reducer):
    """Runs PruneMerge.

    With one number r the degree is r. With lists of r, degree 0 removes nothing, degree 1 follows
    the first list, and so on.
    """

    tracks_size = True

    def __init__(self, config: PruneMerge, vit: ViTShape) -> None:
        super().__init__()
        check_score(config.score, vit, "PruneMerge")
        self.config = config
        self.proportional_attention = config.proportional_attention
        self.needs = frozenset({SCORES[config.score]})
        self.schedules, self.degree = make_removal_dial(
            freeze_removal(config.r), vit, config.max_removed, highest=vit.num_patches // 2
        )
        shares = config.prune_share
        if isinstance(shares, Sequence) and len(shares) > vit.depth:
            raise ValueError(
                f"prune_share must have at most {vit.depth} entries (one per layer), got "
                f"{len(shares)}."
            )
        self.degrees = tuple(range(len(self.schedules)))

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the schedule removes tokens in `layer`."""
        return self.schedules[degree][layer - 1] > 0

    def num_pruned(self, layer: int, removed: int) -> int:
        """How many of the tokens that `layer` removes are dropped."""
        pruned, share = self.config.pruned, self.config.prune_share
        if pruned is not None:
            return min(removed, pruned[layer - 1] if layer <= len(pruned) else 0)
        if isinstance(share, Sequence):
            share = share[layer - 1] if layer <= len(share) else 0.0
        # The epsilon absorbs binary rounding: 0.29 * 100 is 28.999999999999996, not 29.
        return math.floor(share * removed + 1e-9)

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Rank the patch tokens by attention; drop the last ones, merge those before."""
        num_patches = tokens.x.shape[1] - tokens.prefix
        (left,) = patches_after_layers(
            num_patches, [self.schedules[degree][layer - 1]], self.config.max_removed
        )
        pruned = self.num_pruned(layer, num_patches - left)
        scores_BL = token_scores(self.config.score, attended, tokens.prefix)
        return prune_and_merge(tokens.x, scores_BL, num_patches - pruned, left, tokens.prefix)


@in_float32
def prune_and_merge(
    x_BND: Tensor, scores_BL: Tensor, prune_kept: int, merge_kept: int, num_prefix_tokens: int
) -> Grouping | None:
    """Drop the tokens of lowest score, and merge the next ones into the most similar that stays.

    Args:
        x_BND: Features of the tokens; their cosine is the similarity.
        scores_BL: One score per patch token.
        prune_kept: Number of patch tokens that are not dropped.
        merge_kept: Number of patch tokens that stay: at least 1, at most `prune_kept`.
        num_prefix_tokens: Leading tokens that stay and absorb none.

    Returns:
        The grouping, or None if nothing is removed. Order of the new tokens: prefix tokens, then
        patch tokens in descending order of score. The mean of a group counts its members alike; the
        sizes of absorbed tokens count by their similarity.

    Source:
        DiffRate, section 3.2, and the authors' code.
    """
    num_tokens = x_BND.shape[1]
    if merge_kept == num_tokens - num_prefix_tokens:
        return None
    order = best_tokens(scores_BL, prune_kept, num_prefix_tokens)
    num_stay = num_prefix_tokens + merge_kept
    keep, src = order[:, :num_stay], order[:, num_stay:]
    if prune_kept == merge_kept:
        return Grouping.keep_only(keep, num_tokens)
    x_BND = x_BND.detach().float()
    scale_BN = 1.0 / torch.linalg.vector_norm(x_BND, dim=-1)
    stays = torch.zeros_like(scale_BN).scatter(1, keep[:, num_prefix_tokens:], 1.0) > 0
    # Few tokens look for a partner, so all tokens are compared, and those that do not stay hidden:
    # that is faster than to copy the ones that stay.
    similarity, partner = best_partners(take(x_BND, src), x_BND, scale_BN, ~stays)
    place = torch.zeros_like(partner[:, :1]).expand(-1, num_tokens)
    place = place.scatter(1, keep, torch.arange(num_stay, device=keep.device).expand_as(keep))
    return Grouping(
        keep,
        src,
        place.gather(1, partner),
        num_tokens,
        weight=torch.ones_like(scale_BN),
        absorbed_share=(similarity * scale_BN.gather(1, src)).clamp(min=0.0),
    )
