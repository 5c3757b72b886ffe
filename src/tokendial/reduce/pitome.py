"""PiToMe: merge tokens of large groups of alike tokens, protect those that stand alone.

Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS
2024, https://arxiv.org/abs/2405.16148, section 3, and outputs of the authors' code: order and
rounding, and the split of the first layers.

Departures: a dial of tokens merged per layer as well as one of keep ratios; any number of prefix
tokens is protected.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, C metric width.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_count, check_fraction
from tokendial.methods import register
from tokendial.reduce.base import Reducer
from tokendial.reduce.schedules import ScheduledConfig, freeze_removal, make_removal_dial
from tokendial.reduce.tome import MAX_SIMILARITIES, best_partners, in_float32, max_merged
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens, take

_DEFAULT_R = 8
_RATIOS = (0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Keep ratios that a dial of ratios offers besides 1 and the configured one. A layer can merge at
most half of its tokens."""


@register("reduce", "pitome")
@dataclass(frozen=True, kw_only=True)
class PiToMe(ScheduledConfig):
    """PiToMe: merge tokens that many others resemble, in each layer, between attention and FFN."""

    r: int | Sequence[int | float] | Sequence[Sequence[int | float]] | None = None
    """Tokens that each layer merges: one number for all layers; a list with one number per layer
    (missing last layers merge none); or a list of such lists, one for each degree from 1 up, from
    the most to the least expensive. In a list, a float is a share of the image's patches. None: 8,
    unless `keep_ratio` is set."""
    keep_ratio: float | None = None
    """Instead of `r`: fraction of the patch tokens that each layer keeps, in [0.5, 1]. The paper
    has 0.9 to 0.95."""
    margin: tuple[float, float] = (0.75, 0.0)
    """Cosine similarity from which two tokens count as alike, in the first and in the last layer.
    It changes linearly between them."""
    first_layers: int | None = None
    """Number of first layers in which any token may merge: all tokens are split in the order of
    their energy. In later layers only the 2r tokens of highest energy may. None: half of the
    layers, as in the authors' code."""
    proportional_attention: bool = True
    """Whether attention adds the logarithm of the token sizes to its logits, so that a merged token
    counts as much as the patches that it stands for."""

    def __post_init__(self) -> None:
        # A stored default is not a choice of the user: replace(PiToMe(), keep_ratio=0.9) passes it.
        if self.keep_ratio is not None and self.r == _DEFAULT_R:
            object.__setattr__(self, "r", None)
        if self.r is not None and self.keep_ratio is not None:
            raise ValueError(
                f"set r or keep_ratio, not both: got r={self.r!r} and "
                f"keep_ratio={self.keep_ratio!r}."
            )
        if self.keep_ratio is not None:
            check_fraction("keep_ratio", self.keep_ratio)
            if self.keep_ratio < 0.5:
                raise ValueError(f"keep_ratio must lie in [0.5, 1], got {self.keep_ratio}.")
        else:
            object.__setattr__(self, "r", freeze_removal(_DEFAULT_R if self.r is None else self.r))
        pair: object = self.margin
        if not isinstance(pair, list | tuple) or not (
            len(pair) == 2
            and all(type(value) in (int, float) and -1.0 <= value <= 1.0 for value in pair)
        ):
            raise ValueError(f"margin must be two numbers in [-1, 1], got {self.margin!r}.")
        object.__setattr__(self, "margin", tuple(map(float, pair)))
        if self.first_layers is not None:
            check_count("first_layers", self.first_layers, at_least=0)

    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can merge of `num_patches`."""
        return max_merged(num_patches)

    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> "PiToMe":
        """The same method with these schedules as its degrees 1, 2, ..."""
        return replace(self, r=[list(each) for each in schedules], keep_ratio=None)

    def build(self, vit: ViTShape) -> "PiToMeReducer":
        """Make the module. Raises a ValueError if lists do not fit, see `make_schedule_dial`."""
        return PiToMeReducer(self, vit)


class PiToMeReducer(Reducer):
    """Runs PiToMe.

    With one number r the degree is r. With lists of r, degree 0 merges nothing, degree 1 follows
    the first list, and so on. With a keep ratio the degree is the position in a falling list of
    ratios.
    """

    needs = frozenset({"mean_keys"})
    tracks_size = True

    def __init__(self, config: PiToMe, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.proportional_attention = config.proportional_attention
        self._first_layers = vit.depth // 2 if config.first_layers is None else config.first_layers
        self._depth = vit.depth
        self._ratios: tuple[float, ...] | None = None
        self._schedules: list[list[int]] = []
        if config.keep_ratio is not None:
            ratios = {1.0, float(config.keep_ratio), *_RATIOS}
            self._ratios = tuple(sorted(ratios, reverse=True))
            self.degree = self._ratios.index(float(config.keep_ratio))
            self.degrees = tuple(range(len(self._ratios)))
            return
        self._schedules, self.degree = make_removal_dial(
            freeze_removal(config.r), vit, max_merged, highest=max_merged(vit.num_patches)
        )
        self.degrees = tuple(range(len(self._schedules)))

    def num_merged(self, layer: int, degree: int, num_patches: int) -> int:
        """Number of tokens that `layer` merges of `num_patches` patch tokens."""
        if self._ratios is None:
            return min(self._schedules[degree][layer - 1], max_merged(num_patches))
        # The epsilon absorbs binary rounding: 100 - 100 * 0.93 is 6.999999999999986, not 7.
        merged = math.floor(num_patches - num_patches * self._ratios[degree] + 1e-9)
        return min(merged, max_merged(num_patches))

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the schedule merges tokens in `layer`."""
        return self._ratios is not None or self._schedules[degree][layer - 1] > 0

    def margin(self, layer: int) -> float:
        """Similarity from which two tokens count as alike in `layer`."""
        first, last = self.config.margin
        return first + (last - first) * (layer - 1) / max(1, self._depth - 1)

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Match the tokens of highest energy by the similarity of their keys in this layer."""
        assert attended.mean_keys is not None
        return energy_matching(
            attended.mean_keys,
            self.num_merged(layer, degree, tokens.x.shape[1] - tokens.prefix),
            margin=self.margin(layer),
            num_prefix_tokens=tokens.prefix,
            any_token=layer <= self._first_layers,
        )


def energy(unit_BLC: Tensor, margin: float) -> Tensor:
    """Energy of each token: the mean of ELU(cosine - margin) over all tokens, itself included.

    It is high for a token that many others resemble, such as one of a large plain area.

    Args:
        unit_BLC: Vectors of length 1 whose product is the similarity.
        margin: Similarity from which two tokens count as alike.

    Returns:
        [B, L].

    Source:
        PiToMe, equation 4.
    """
    every = unit_BLC.transpose(-1, -2)
    # All similarities of a large image would take more memory than its features, so they are
    # computed for a chunk of the tokens at a time.
    chunk_size = max(1, MAX_SIMILARITIES // unit_BLC.shape[1])
    chunks = torch.split(unit_BLC, chunk_size, dim=1)
    return torch.cat([_energy(chunk, every, margin) for chunk in chunks], dim=1)


def _energy(some_BKC: Tensor, every_BCL: Tensor, margin: float) -> Tensor:
    excess = (some_BKC @ every_BCL).sub_(margin)
    # The mean of ELU(x) = max(x, 0) + exp(min(x, 0)) - 1 in passes that need no new memory.
    below = excess.clamp(max=0.0).exp_().mean(dim=-1)
    return below + excess.clamp_(min=0.0).mean(dim=-1) - 1.0


@in_float32
def energy_matching(
    metric_BNC: Tensor,
    r: int,
    *,
    margin: float,
    num_prefix_tokens: int = 0,
    any_token: bool = False,
) -> Grouping | None:
    """Match tokens in the order of their energy and merge `r` of them.

    Args:
        metric_BNC: Features whose cosine is the similarity (keys, mean over heads).
        r: Tokens to merge, at most half of the unprotected ones.
        margin: Similarity from which two tokens count as alike.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.
        any_token: Whether all patch tokens are split, as in the first layers. If not, only the 2r
            tokens of highest energy are, and each of the first set merges.

    Returns:
        The grouping, or None if nothing merges. Order of the new tokens: prefix tokens; the other
        tokens that do not absorb, from most to least similar (`any_token`) or in descending energy;
        the tokens that absorb, in descending energy.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    r = min(r, max_merged(num_tokens - num_prefix_tokens))
    if r <= 0:
        return None
    patches_BLC = metric_BNC.detach()[:, num_prefix_tokens:].float()
    unit_BLC = patches_BLC / torch.linalg.vector_norm(patches_BLC, dim=-1, keepdim=True)
    order_BL = energy(unit_BLC, margin).argsort(dim=1, descending=True, stable=True)
    split_BK = order_BL if any_token else order_BL[:, : 2 * r]
    source_BA, target_BE = split_BK[:, 0::2], split_BK[:, 1::2]
    best_BA, partner_BA = best_partners(take(unit_BLC, source_BA), take(unit_BLC, target_BE))
    if any_token:
        by_similarity_BA = best_BA.argsort(dim=1, descending=True, stable=True)
        source_BA = source_BA.gather(1, by_similarity_BA)
        partner_BA = partner_BA.gather(1, by_similarity_BA)
        left = source_BA[:, r:]
    else:
        left = order_BL[:, 2 * r :]
    prefix = torch.arange(num_prefix_tokens, device=metric_BNC.device).expand(num_images, -1)
    keep = torch.cat([prefix, num_prefix_tokens + left, num_prefix_tokens + target_BE], dim=1)
    first = num_prefix_tokens + left.shape[1]
    src = num_prefix_tokens + source_BA[:, :r]
    return Grouping(keep, src, first + partner_BA[:, :r], num_tokens)
