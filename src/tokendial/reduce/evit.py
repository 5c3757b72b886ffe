"""EViT: keep the patch tokens that the class token attends to most, fuse or drop the others.

Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, https://arxiv.org/abs/2202.07800, and the authors' code: the kept
tokens stand in descending order of attention, the fused token comes last and its weights are the
raw attention values. Departures: the number kept is not raised by binary rounding error (0.07 of
100 tokens are 7, not 8); backbones without a class token can be scored by the attention that
tokens receive from all others, which is not in the paper. The variant with `r` tokens less in
every layer is Token Compensator's (Jie et al., ECCV 2024, https://arxiv.org/abs/2408.06798).
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, K kept patch tokens.

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_choice, check_layers, check_own_layers, check_share
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig, best_tokens, dial_of, num_kept_tokens
from tokendial.reduce.listed import check_removed, dial_of_lists
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@register("reduce", "evit")
@dataclass(frozen=True, kw_only=True)
class EViT(ReducerConfig):
    """Keep a share of the patch tokens in a few layers, or remove `r` of them in every layer."""

    keep_rate: float | list[float] | None = None
    """Share of the patch tokens kept in each layer of `layers`, in (0, 1]; a list gives one per
    layer. Default 0.7, unless `r` is given."""
    layers: tuple[int, ...] = (4, 7, 10)
    """Layers that reduce, counted from 1. Ignored with `r`, which counts every layer."""
    r: int | list[int] | list[list[int]] | None = None
    """Tokens removed instead of a keep rate: one number for every layer, a list (one entry per
    layer, missing ones are 0), or a list of such lists (one for each degree from 1 up, from dear to
    cheap)."""
    rest: Literal["merge", "argmax", "drop"] = "merge"
    """What becomes of the other tokens: one fused token, only the most attended of them, or
    nothing."""
    fuse_weights: Literal["raw", "normalised"] = "raw"
    """Weights of the fused token: attention as it is (sums to less than 1), or divided by its
    sum."""
    score: Literal["class", "mean"] = "class"
    """Attention that ranks the tokens: the class token's, or, for backbones without one, the mean
    over all tokens (one more attention map in each layer that reduces)."""
    shrink: tuple[int, int] | None = None
    """Epochs of training (counted from 0) between which the keep rate shrinks from 1 to its
    target; null: the target from the start."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.r is None and self.keep_rate is None:
            object.__setattr__(self, "keep_rate", 0.7)
        if self.r is not None and self.keep_rate is not None:
            raise ValueError(f"give keep_rate or r, not both; got {self.keep_rate} and {self.r}.")
        if self.r is not None:
            check_removed(self.r)
        check_own_layers(self.layers)
        self._check_rates()
        check_choice("rest", self.rest, ("merge", "argmax", "drop"))
        check_choice("fuse_weights", self.fuse_weights, ("raw", "normalised"))
        check_choice("score", self.score, ("class", "mean"))
        if self.shrink is not None:
            object.__setattr__(self, "shrink", tuple(self.shrink))
            if len(self.shrink) != 2 or not 0 <= self.shrink[0] < self.shrink[1]:
                raise ValueError(f"shrink must be two rising epochs, got {self.shrink}.")
            if self.r is not None:
                raise ValueError("shrink goes with keep_rate, not with r.")

    def _check_rates(self) -> None:
        rates = self.keep_rate if isinstance(self.keep_rate, list) else [self.keep_rate]
        for rate in rates:
            if rate is not None:
                check_share("keep_rate", rate)
        if isinstance(self.keep_rate, list) and len(self.keep_rate) != len(self.layers):
            raise ValueError(
                f"keep_rate must have one entry for each of the {len(self.layers)} layers, "
                f"got {len(self.keep_rate)}."
            )

    def build(self, vit: ViTShape) -> "EViTReducer":
        """Make the module; a ValueError without a class token, or if layers or lists do not fit."""
        return EViTReducer(self, vit)


class EViTReducer(Reducer):
    """Runs EViT.

    The degree is r; with lists of r, 0 (off), 1 (the first list), 2, ...; with one keep rate, the
    position in the list of keep rates 1, 0.9, ... 0.1 (into which another rate is sorted); with a
    list of keep rates, 0 (off) or 1 (as listed).
    """

    def __init__(self, config: EViT, vit: ViTShape) -> None:
        super().__init__()
        if config.score == "class" and not vit.has_class_token:
            raise ValueError(
                "EViT needs a backbone with a class token; for this one use score='mean' or ToMe."
            )
        self.config = config
        self.needs = frozenset({f"{config.score}_attention"})
        self.layers = tuple(range(1, vit.depth + 1)) if config.r is not None else config.layers
        check_layers(self.layers, vit.depth)
        self._rates: list[dict[int, float]] = []
        self._shrinking: Callable[[float], float] | None = None
        self.lists: list[list[int]] = []
        if isinstance(config.r, list):
            self.lists = dial_of_lists(config.r, vit, partial(most_removed, rest=config.rest))
            self.degrees, self.degree = tuple(range(len(self.lists))), 1
            return
        if config.r is not None:
            self.degrees = tuple(range(vit.num_patches // 2 + 1))
            self.degree = config.r
            return
        if isinstance(config.keep_rate, list):
            listed = dict(zip(config.layers, config.keep_rate, strict=True))
            self._rates = [dict.fromkeys(config.layers, 1.0), listed]
            self.degree = 1
        else:
            assert config.keep_rate is not None
            rates, self.degree = dial_of(config.keep_rate)
            self._rates = [dict.fromkeys(config.layers, rate) for rate in rates]
        self.degrees = tuple(range(len(self._rates)))

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Shrink the keep rate of training as `shrink` says."""
        if self.config.shrink:
            first, last = self.config.shrink
            self._shrinking = partial(
                shrunk_keep_rate,
                step=step,
                steps_per_epoch=steps_per_epoch,
                start_epoch=first,
                end_epoch=last,
            )

    def keep_rate(self, layer: int, degree: int) -> float:
        """Share of the patch tokens that `layer` keeps, at this step if in training."""
        rate = self._rates[degree].get(layer, 1.0)
        return self._shrinking(rate) if self.training and self._shrinking else rate

    def num_kept(self, layer: int, degree: int, num_patches: int) -> int:
        """Patch tokens kept apart in `layer`; a fused or argmax token comes on top."""
        if self.config.r is None:
            return num_kept_tokens(num_patches, self.keep_rate(layer, degree))
        extra = self.config.rest != "drop"
        # A fused token stands for what goes, so removing r tokens takes r + 1 out.
        return max(1, num_patches - self.removed(layer, degree) - extra)

    def removed(self, layer: int, degree: int) -> int:
        """Patch tokens that `layer` removes, with `r`."""
        return self.lists[degree][layer - 1] if self.lists else degree

    def acts(self, layer: int, degree: int) -> bool:
        """Whether this layer has a keep rate below 1, or r is above 0."""
        if self.config.r is not None:
            return self.removed(layer, degree) > 0
        return self.keep_rate(layer, degree) < 1.0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Keep the patch tokens that are attended to most."""
        by_class = self.config.score == "class"
        scores = attended.class_attention if by_class else attended.mean_attention
        assert scores is not None
        scores_BL = scores[:, tokens.prefix :]
        return attentive_grouping(
            scores_BL,
            self.num_kept(layer, degree, scores_BL.shape[1]),
            num_prefix_tokens=tokens.prefix,
            rest=self.config.rest,
            fuse_weights=self.config.fuse_weights,
        )


def attentive_grouping(
    scores_BL: Tensor,
    num_kept: int,
    *,
    num_prefix_tokens: int = 1,
    rest: Literal["merge", "argmax", "drop"] = "merge",
    fuse_weights: Literal["raw", "normalised"] = "raw",
) -> Grouping | None:
    """Keep the `num_kept` best patch tokens in descending order of score, after the prefix.

    Args:
        scores_BL: One score per patch token.
        num_kept: Patch tokens to keep; a Python int, so that shapes are static.
        num_prefix_tokens: Leading tokens that always stay.
        rest: "merge" appends the sum of the others, weighted by score; "argmax" appends the best
            of the others; "drop" appends nothing.
        fuse_weights: Whether the weights of the sum are the scores ("raw") or the scores divided
            by their sum ("normalised").

    Returns:
        The grouping, or None if every patch token is kept.
    """
    num_images, num_patches = scores_BL.shape
    if num_kept + (rest == "argmax") >= num_patches:
        return None
    num_stay = num_prefix_tokens + num_kept + (rest != "drop")
    num_tokens = num_prefix_tokens + num_patches
    order = best_tokens(scores_BL, num_patches, num_prefix_tokens)
    keep, src = order[:, :num_stay], order[:, num_stay:]
    if rest != "merge":
        return Grouping.keeping(keep, num_tokens)
    kept = keep[:, num_prefix_tokens:-1] - num_prefix_tokens
    weight = scores_BL
    if fuse_weights == "normalised":
        weight = scores_BL / scores_BL.scatter(1, kept, 0.0).sum(dim=1, keepdim=True)
    weight = weight.scatter(1, kept, 1.0)
    weight = torch.cat([weight.new_ones(num_images, num_prefix_tokens), weight], dim=1)
    fused = torch.full_like(keep[:, :1], keep.shape[1] - 1)
    dst = fused.expand_as(src)
    return Grouping(keep, src, dst, num_tokens, weight, "sum", fused)


def most_removed(num_patches: int, rest: str) -> int:
    """How many of the patch tokens can go in one layer: one stays, and what stands for the rest."""
    return max(0, num_patches - 1 - (rest != "drop"))


def shrunk_keep_rate(
    keep_rate: float, *, step: int, steps_per_epoch: int, start_epoch: int, end_epoch: int
) -> float:
    """Keep rate at a training step when it shrinks from 1 to its target by a cosine.

    Args:
        keep_rate: Target, in (0, 1].
        step: Training steps done so far.
        steps_per_epoch: Steps in one epoch.
        start_epoch: Epoch (from 0) at which shrinking starts; 1.0 before it.
        end_epoch: Epoch at which the target is reached.

    Source:
        EViT, section 4.1 (warm-up of the keep rate); the authors' `adjust_keep_rate`.
    """
    epoch = step // steps_per_epoch
    if epoch < start_epoch:
        return 1.0
    if epoch >= end_epoch:
        return keep_rate
    done = step - start_epoch * steps_per_epoch
    total = (end_epoch - start_epoch) * steps_per_epoch
    return keep_rate + (1.0 - keep_rate) * 0.5 * (1.0 + math.cos(math.pi * done / total))
