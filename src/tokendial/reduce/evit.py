"""EViT: keep the patch tokens that the class token attends to most, fuse or drop the others.

Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, https://arxiv.org/abs/2202.07800, and the authors' code: the kept
tokens stand in descending order of attention, the fused token comes last and its weights are the
raw attention values. Departures: the number kept is not raised by binary rounding error
(0.07 of 100 tokens are 7, not 8). The variant with `r` tokens less in every layer is Token
Compensator's (Jie et al., ECCV 2024, https://arxiv.org/abs/2408.06798).
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, K kept patch tokens.

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokendial.attention import Attended
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig, ViTShape, check_layers
from tokendial.tokens import Grouping, Tokens

DIAL_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@register("reduce", "evit")
@dataclass(frozen=True, kw_only=True)
class EViT(ReducerConfig):
    """Keep a share of the patch tokens in a few layers, or remove `r` of them in every layer."""

    keep_rate: float | list[float] | None = None
    """Share of the patch tokens kept in each layer of `layers`, in (0, 1]; a list gives one per
    layer. Default 0.7, unless `r` is given."""
    layers: tuple[int, ...] = (4, 7, 10)
    """Layers that reduce, counted from 1. Ignored with `r`, which acts in every layer."""
    r: int | None = None
    """Tokens removed in every layer, instead of a keep rate."""
    rest: Literal["merge", "argmax", "drop"] = "merge"
    """What becomes of the other tokens: one fused token, only the most attended of them, or
    nothing."""
    fuse_weights: Literal["raw", "normalised"] = "raw"
    """Weights of the fused token: attention as it is (sums to less than 1), or divided by its
    sum."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.r is None and self.keep_rate is None:
            object.__setattr__(self, "keep_rate", 0.7)
        if self.r is not None and self.keep_rate is not None:
            raise ValueError(f"give keep_rate or r, not both; got {self.keep_rate} and {self.r}.")
        if self.r is not None and (type(self.r) is not int or self.r < 0):
            raise ValueError(f"r must be an integer of at least 0, got {self.r}.")
        if not self.layers or any(type(n) is not int or n < 1 for n in self.layers):
            raise ValueError(f"layers must be integers from 1 up, got {self.layers}.")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must differ from each other, got {self.layers}.")
        self._check_rates()
        for name, allowed in (
            ("rest", ("merge", "argmax", "drop")),
            ("fuse_weights", ("raw", "normalised")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    def _check_rates(self) -> None:
        rates = self.keep_rate if isinstance(self.keep_rate, list) else [self.keep_rate]
        for rate in rates:
            if rate is not None and not (isinstance(rate, int | float) and 0.0 < rate <= 1.0):
                raise ValueError(f"keep_rate must be in (0, 1], got {rate}.")
        if isinstance(self.keep_rate, list) and len(self.keep_rate) != len(self.layers):
            raise ValueError(
                f"keep_rate must have one entry for each of the {len(self.layers)} layers, "
                f"got {len(self.keep_rate)}."
            )

    def build(self, vit: ViTShape) -> "EViTReducer":
        """Make the module; raises a ValueError without a class token or for a missing layer."""
        return EViTReducer(self, vit)


class EViTReducer(Reducer):
    """Runs EViT.

    The degree is r; with one keep rate, the position in the list of keep rates 1, 0.9, ... 0.1
    (into which another rate is sorted); with a list of keep rates, 0 (off) or 1 (as listed).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})

    def __init__(self, config: EViT, vit: ViTShape) -> None:
        super().__init__()
        if not vit.has_class_token:
            raise ValueError("EViT needs a backbone with a class token; use ToMe for this one.")
        self.config = config
        self.layers = tuple(range(1, vit.depth + 1)) if config.r is not None else config.layers
        check_layers(self.layers, vit.depth)
        self._rates: list[dict[int, float]] = []
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
            steps = sorted({1.0, float(config.keep_rate), *DIAL_KEEP_RATES}, reverse=True)
            self._rates = [dict.fromkeys(config.layers, rate) for rate in steps]
            self.degree = steps.index(config.keep_rate)
        self.degrees = tuple(range(len(self._rates)))

    def num_kept(self, layer: int, degree: int, num_patches: int) -> int:
        """Patch tokens kept apart in `layer`; a fused or argmax token comes on top."""
        if self.config.r is None:
            return num_kept_tokens(num_patches, self._rates[degree].get(layer, 1.0))
        extra = self.config.rest != "drop"
        # A fused token stands for what goes, so removing r tokens takes r + 1 out.
        return max(1, num_patches - degree - extra) if degree else num_patches

    def acts(self, layer: int, degree: int) -> bool:
        """Whether this layer has a keep rate below 1, or r is above 0."""
        if self.config.r is None:
            return self._rates[degree].get(layer, 1.0) < 1.0
        return degree > 0

    def group(self, layer: int, degree: int, tokens: Tokens, attended: Attended) -> Grouping | None:
        """Keep the patch tokens that the class token attends to most."""
        assert attended.class_attention is not None
        scores_BL = attended.class_attention[:, tokens.prefix :]
        return attentive_grouping(
            scores_BL,
            self.num_kept(layer, degree, scores_BL.shape[1]),
            num_prefix_tokens=tokens.prefix,
            rest=self.config.rest,
            fuse_weights=self.config.fuse_weights,
        )


def num_kept_tokens(num_patches: int, keep_rate: float) -> int:
    """Number of patch tokens left at `keep_rate`, rounded up and never below one.

    Example:
        >>> num_kept_tokens(196, 0.7)
        138
    """
    # The epsilon absorbs binary rounding: 0.07 * 100 is 7.000000000000001, not 7.
    return max(1, math.ceil(keep_rate * num_patches - 1e-9))


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
    order_BL = scores_BL.argsort(dim=1, descending=True, stable=True)
    num_stay = num_kept + (rest != "drop")
    prefix = torch.arange(num_prefix_tokens, device=scores_BL.device).expand(num_images, -1)
    keep = torch.cat([prefix, num_prefix_tokens + order_BL[:, :num_stay]], dim=1)
    num_tokens = num_prefix_tokens + num_patches
    if rest != "merge":
        nothing = keep[:, :0]
        return Grouping(keep, nothing, nothing, num_tokens)
    src = num_prefix_tokens + order_BL[:, num_stay:]
    kept = order_BL[:, :num_kept]
    weight = scores_BL
    if fuse_weights == "normalised":
        weight = scores_BL / scores_BL.scatter(1, kept, 0.0).sum(dim=1, keepdim=True)
    weight = weight.scatter(1, kept, 1.0)
    weight = torch.cat([weight.new_ones(num_images, num_prefix_tokens), weight], dim=1)
    dst = torch.full_like(src, keep.shape[1] - 1)
    return Grouping(keep, src, dst, num_tokens, weight, "sum")


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
