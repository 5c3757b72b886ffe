"""EViT: keep the patch tokens that the class token attends to most, fuse or drop the others.

Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, https://arxiv.org/abs/2202.07800, and the authors' code: the kept
tokens stand in descending order of attention; the fused token comes last, and its weights are the
raw attention values. The variant that removes `r` tokens in every layer is Token Compensator's (Jie
et al., ECCV 2024, https://arxiv.org/abs/2408.06798).

Departures: binary rounding error does not raise the number of kept tokens (0.07 of 100 tokens are
7, not 8). In backbones without a class token, tokens can be scored by the mean attention that they
receive from all tokens, which is not in the paper. Scores by the change of a token are those of
Representation Shift (Choi et al., ICCV 2025, https://arxiv.org/abs/2508.00367), on the attention
branch.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, K kept patch tokens.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import (
    check_choice,
    check_count,
    check_fraction,
    check_layers,
    check_layers_exist,
)
from tokendial.methods import register
from tokendial.reduce.base import (
    SCORES,
    Reducer,
    best_tokens,
    check_score,
    make_rate_dial,
    num_kept_tokens,
    token_scores,
)
from tokendial.reduce.schedules import ScheduledConfig, freeze_removal, make_schedule_dial
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens

_DEFAULT_KEEP_RATE = 0.7


@register("reduce", "evit")
@dataclass(frozen=True, kw_only=True)
class EViT(ScheduledConfig):
    """EViT: keep a fraction of the patch tokens in a few layers, or remove `r` in each layer."""

    keep_rate: float | Sequence[float] | None = _DEFAULT_KEEP_RATE
    """Fraction of the patch tokens that each layer of `layers` keeps, in (0, 1], or a list with one
    fraction per layer of `layers`. None if `r` is set."""
    layers: tuple[int, ...] = (4, 7, 10)
    """Layers that reduce, counted from 1. Not used if `r` is set: then all layers reduce."""
    r: int | Sequence[int | float] | Sequence[Sequence[int | float]] | None = None
    """Tokens that each layer removes, instead of a keep rate: one number for all layers; a list
    with one number per layer (missing last layers remove none); or a list of such lists, one for
    each degree from 1 up, from the most to the least expensive. In a list, a float is a share of
    the image's patches."""
    rest: Literal["merge", "argmax", "drop"] = "merge"
    """What happens to the tokens that are not kept: "merge" fuses them into one token, "argmax"
    keeps one more token (the most attended of them), "drop" removes them all."""
    fuse_weights: Literal["raw", "normalised"] = "raw"
    """Weights of the tokens in the fused token: their attention values ("raw", which sum to less
    than 1), or these divided by their sum ("normalised")."""
    score: Literal["class", "mean", "shift"] = "class"
    """What ranks the tokens. "class": the attention of the class token. "mean": the mean attention
    over all tokens, for backbones without a class token; it computes one more attention map in each
    layer that reduces. "shift": how much the attention branch changes a token, which needs neither
    a class token nor an attention map; the weights of the fused token are normalised then."""
    shrink: tuple[int, int] | None = None
    """First and last epoch (counted from 0) of a cosine along which the keep rate falls from 1 to
    `keep_rate` in training; cannot be set together with `r`. null: training uses `keep_rate` from
    the start."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_layers(self.layers)
        # A stored default is not a choice of the user: dataclasses.replace(EViT(), r=3) passes it.
        if self.r is not None and self.keep_rate == _DEFAULT_KEEP_RATE:
            object.__setattr__(self, "keep_rate", None)
        if self.r is None and self.keep_rate is None:
            object.__setattr__(self, "keep_rate", _DEFAULT_KEEP_RATE)
        if self.r is None:
            self._freeze_keep_rate()
        elif self.keep_rate is None:
            object.__setattr__(self, "r", freeze_removal(self.r))
        else:
            raise ValueError(
                f"set keep_rate or r, not both: got keep_rate={self.keep_rate!r} and r={self.r!r}; "
                "set the other one to None."
            )
        check_choice("rest", self.rest, ("merge", "argmax", "drop"))
        check_choice("fuse_weights", self.fuse_weights, ("raw", "normalised"))
        check_choice("score", self.score, tuple(SCORES))
        if self.shrink is not None:
            self._check_shrink(tuple(self.shrink))

    def _freeze_keep_rate(self) -> None:
        if not isinstance(self.keep_rate, list | tuple):
            check_fraction("keep_rate", self.keep_rate)
            return
        if len(self.keep_rate) != len(self.layers):
            raise ValueError(
                f"keep_rate must have one entry for each of the {len(self.layers)} layers, "
                f"got {len(self.keep_rate)}."
            )
        for rate in self.keep_rate:
            check_fraction("keep_rate", rate)
        object.__setattr__(self, "keep_rate", tuple(self.keep_rate))

    def _check_shrink(self, shrink: tuple[int, ...]) -> None:
        if self.r is not None:
            raise ValueError(f"shrink must be None where r is set, got {shrink} and r={self.r}.")
        for epoch in shrink:
            check_count("shrink", epoch, at_least=0)
        if len(shrink) != 2 or shrink[0] >= shrink[1]:
            raise ValueError(f"shrink must be two rising epochs, got {shrink}.")
        object.__setattr__(self, "shrink", shrink)

    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can remove of `num_patches`.

        One token is always kept, and one more for the others if `rest` is "merge" or "argmax".
        """
        return max(0, num_patches - 1 - (self.rest != "drop"))

    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> "EViT":
        """The same method with these schedules as its degrees 1, 2, ..."""
        r = [list(schedule) for schedule in schedules]
        return replace(self, r=r, keep_rate=None, shrink=None)

    def build(self, vit: ViTShape) -> "EViTReducer":
        """Make the module.

        Raises:
            ValueError: If the backbone has no class token for the score, a layer does not exist,
                or lists of `r` do not fit, see `make_schedule_dial`.
        """
        return EViTReducer(self, vit)


class EViTReducer(Reducer):
    """Runs EViT.

    What the degree means depends on the setting. One number r: the degree is r. Lists of r: degree
    0 removes nothing, degree 1 follows the first list, and so on. One keep rate: the position in
    the list of keep rates of `make_rate_dial`. A list of keep rates: 0 removes nothing, 1 keeps the
    listed shares.
    """

    def __init__(self, config: EViT, vit: ViTShape) -> None:
        super().__init__()
        check_score(config.score, vit, "EViT")
        self.config = config
        self.needs = frozenset({SCORES[config.score]})
        self.layers = tuple(range(1, vit.depth + 1)) if config.r is not None else config.layers
        check_layers_exist(self.layers, vit.depth)
        self._rates: list[dict[int, float]] = []
        self._keep_rate_now: Callable[[float], float] | None = None
        self.lists: list[list[int]] = []
        if config.r is not None:
            r = freeze_removal(config.r)
            if isinstance(r, int):
                self.degrees, self.degree = tuple(range(vit.num_patches // 2 + 1)), r
            else:
                self.lists = make_schedule_dial(r, vit, config.max_removed)
                self.degrees, self.degree = tuple(range(len(self.lists))), 1
            return
        if isinstance(config.keep_rate, Sequence):
            listed = dict(zip(config.layers, config.keep_rate, strict=True))
            self._rates = [dict.fromkeys(config.layers, 1.0), listed]
            self.degree = 1
        else:
            assert config.keep_rate is not None
            rates, self.degree = make_rate_dial(config.keep_rate)
            self._rates = [dict.fromkeys(config.layers, rate) for rate in rates]
        self.degrees = tuple(range(len(self._rates)))

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Set the keep rate of this training step, if `shrink` is set."""
        if self.config.shrink:
            first, last = self.config.shrink
            self._keep_rate_now = partial(
                shrinking_keep_rate,
                step=step,
                steps_per_epoch=steps_per_epoch,
                start_epoch=first,
                end_epoch=last,
            )

    def keep_rate(self, layer: int, degree: int) -> float:
        """Fraction of the patch tokens that `layer` keeps; in training, at the present step."""
        rate = self._rates[degree].get(layer, 1.0)
        return self._keep_rate_now(rate) if self.training and self._keep_rate_now else rate

    def num_kept(self, layer: int, degree: int, num_patches: int) -> int:
        """Number of patch tokens that `layer` keeps, without the fused or the argmax token."""
        if self.config.r is None:
            return num_kept_tokens(num_patches, self.keep_rate(layer, degree))
        extra = self.config.rest != "drop"
        # The fused token is added, so r tokens fewer means that r + 1 tokens are not kept.
        return max(1, num_patches - self.removed(layer, degree) - extra)

    def removed(self, layer: int, degree: int) -> int:
        """Number of patch tokens that `layer` removes, if `r` is set."""
        return self.lists[degree][layer - 1] if self.lists else degree

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether `layer` has a keep rate below 1, or removes tokens by `r`."""
        if self.config.r is not None:
            return self.removed(layer, degree) > 0
        return self.keep_rate(layer, degree) < 1.0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Keep the patch tokens of the highest scores."""
        scores_BL = token_scores(self.config.score, attended, tokens.prefix)
        return attentive_grouping(
            scores_BL,
            self.num_kept(layer, degree, scores_BL.shape[1]),
            num_prefix_tokens=tokens.prefix,
            rest=self.config.rest,
            # Attention values sum to less than 1. Changes of tokens do not.
            fuse_weights="normalised" if self.config.score == "shift" else self.config.fuse_weights,
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
        num_kept: Number of patch tokens to keep. A Python int, so that shapes are static.
        num_prefix_tokens: Number of leading tokens that are always kept.
        rest: "merge" appends the sum of the other tokens, weighted by score; "argmax" appends the
            best of the other tokens; "drop" appends nothing.
        fuse_weights: Weights in that sum: the scores ("raw"), or the scores divided by their sum
            ("normalised").

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
        return Grouping.keep_only(keep, num_tokens)
    kept = keep[:, num_prefix_tokens:-1] - num_prefix_tokens
    weight = scores_BL
    if fuse_weights == "normalised":
        weight = scores_BL / scores_BL.scatter(1, kept, 0.0).sum(dim=1, keepdim=True)
    weight = weight.scatter(1, kept, 1.0)
    weight = torch.cat([weight.new_ones(num_images, num_prefix_tokens), weight], dim=1)
    fused = torch.full_like(keep[:, :1], keep.shape[1] - 1)
    dst = fused.expand_as(src)
    return Grouping(keep, src, dst, num_tokens, weight, "sum", fused)


def shrinking_keep_rate(
    keep_rate: float, *, step: int, steps_per_epoch: int, start_epoch: int, end_epoch: int
) -> float:
    """Return the keep rate at a training step, which falls from 1 to its target along a cosine.

    Args:
        keep_rate: The target, in (0, 1].
        step: Number of finished training steps.
        steps_per_epoch: Number of steps in one epoch.
        start_epoch: Epoch (counted from 0) in which the rate starts to fall; it is 1.0 before.
        end_epoch: Epoch from which on the rate is the target.

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
