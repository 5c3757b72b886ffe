"""ToMe: merge similar tokens by bipartite soft matching.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
https://arxiv.org/abs/2210.09461, section 3 and appendix D (schedules), and the authors' code for
order and rounding. Departures: any number of prefix tokens is protected, where the code knows a
class and a distillation token; k-th matching keeps the tokens of an incomplete last group, where
the code drops them.
"""

# Shape legend: B batch, N tokens, C metric width, A tokens of the even set, E tokens of the odd.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokendial.attention import Attended
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig, ViTShape
from tokendial.tokens import Grouping, Tokens


@register("reduce", "tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(ReducerConfig):
    """Merge the `r` most similar token pairs in each layer, between attention and FFN."""

    r: int | list[int] | tuple[int, float] = 8
    """Tokens merged per layer: one number, a list (one entry per layer, missing ones are 0), or in
    Python a tuple (r, inflection), which sets both fields."""
    inflection: float = 0.0
    """Slope of the schedule over depth in [-1, 1]: 0 constant, 1 from 0 up to 2r, -1 from 2r
    down to 0. With one number r only."""
    proportional_attention: bool = True
    """Add the logarithm of token sizes to the attention logits."""

    def __post_init__(self) -> None:
        if isinstance(self.r, tuple):
            if len(self.r) != 2 or self.inflection:
                raise ValueError(f"r as a tuple must be (r, inflection), got {self.r}.")
            object.__setattr__(self, "inflection", float(self.r[1]))
            object.__setattr__(self, "r", self.r[0])
        per_layer = self.r if isinstance(self.r, list) else [self.r]
        if not per_layer or not all(type(r) is int and r >= 0 for r in per_layer):
            raise ValueError(
                f"r must be an integer of at least 0, or a list of them, got {self.r}."
            )
        if not -1.0 <= self.inflection <= 1.0:
            raise ValueError(f"inflection must lie in [-1, 1], got {self.inflection}.")
        if self.inflection and isinstance(self.r, list):
            raise ValueError("inflection needs one number r, got a list.")

    def build(self, vit: ViTShape) -> "ToMeReducer":
        """Make the module; raises a ValueError if a list is longer than the model is deep."""
        return ToMeReducer(self, vit)


class ToMeReducer(Reducer):
    """Runs ToMe. The degree is r; with a list of r, it is 0 (off) or 1 (as listed)."""

    needs: ClassVar[frozenset[str]] = frozenset({"mean_keys"})
    tracks_size: ClassVar[bool] = True

    def __init__(self, config: ToMe, vit: ViTShape) -> None:
        super().__init__()
        self.config, self.depth = config, vit.depth
        self.proportional_attention = config.proportional_attention
        if isinstance(config.r, list):
            if len(config.r) > vit.depth:
                raise ValueError(
                    f"r must have at most {vit.depth} entries (one per layer), got {len(config.r)}."
                )
            self.degrees, self.degree = (0, 1), 1
        else:
            # At most half of the unprotected tokens can merge in one layer; more changes nothing.
            self.degrees = tuple(range(vit.num_patches // 2 + 1))
            self.degree = int(config.r)  # type: ignore[arg-type]  # not a tuple after the checks

    def schedule(self, degree: int) -> list[int]:
        """Tokens to merge in each layer, before the cap of half the tokens."""
        if isinstance(self.config.r, list):
            return merge_schedule([r * degree for r in self.config.r], self.depth)
        return merge_schedule(degree, self.depth, self.config.inflection)

    def acts(self, layer: int, degree: int) -> bool:
        """Whether the schedule merges anything in `layer`."""
        return self.schedule(degree)[layer - 1] > 0

    def group(self, layer: int, degree: int, tokens: Tokens, attended: Attended) -> Grouping | None:
        """Merge along the keys of this layer."""
        assert attended.mean_keys is not None
        r = self.schedule(degree)[layer - 1]
        return bipartite_matching(attended.mean_keys, r, num_prefix_tokens=tokens.prefix)


def merge_schedule(r: int | list[int], depth: int, inflection: float = 0.0) -> list[int]:
    """Tokens merged in each of `depth` layers.

    Args:
        r: A number, the mean over layers, or a list, padded with zeros.
        depth: Number of layers.
        inflection: 0 constant, 1 increasing from 0 to 2r, -1 decreasing from 2r to 0.

    Example:
        >>> merge_schedule(8, 4, inflection=-1.0)
        [16, 10, 5, 0]
    """
    if isinstance(r, list):
        return r + [0] * (depth - len(r))
    first = int(r * (1.0 - inflection))
    step = (2 * r - 2 * first) / (depth - 1) if depth > 1 else 0.0
    return [int(first + step * layer) for layer in range(depth)]


def bipartite_matching(
    metric_BNC: Tensor, r: int, *, num_prefix_tokens: int = 0
) -> Grouping | None:
    """Match even tokens with their most similar odd tokens and merge the `r` best pairs.

    Args:
        metric_BNC: What similarity is measured on (keys, mean over heads).
        r: Pairs to merge; capped at half of the unprotected tokens.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.

    Returns:
        The grouping, or None if nothing merges. Order of the new tokens: prefix, even tokens
        that are left, odd tokens.

    Source:
        ToMe, appendix D. As in the authors' code the even tokens that are left keep their image
        order when there is a prefix token, and run from most to least similar when there is none.
    """
    num_tokens = metric_BNC.shape[1]
    r = min(r, (num_tokens - num_prefix_tokens) // 2)
    if r <= 0:
        return None
    with torch.no_grad():
        metric_BNC = metric_BNC / metric_BNC.norm(dim=-1, keepdim=True)
        scores_BAE = metric_BNC[:, ::2] @ metric_BNC[:, 1::2].transpose(-1, -2)
        num_even_prefix, num_odd_prefix = (num_prefix_tokens + 1) // 2, num_prefix_tokens // 2
        if num_prefix_tokens:
            scores_BAE[:, :num_even_prefix] = -torch.inf
            scores_BAE[:, :, :num_odd_prefix] = -torch.inf
        best_BA, partner_BA = scores_BAE.max(dim=-1)
        order_BA = best_BA.argsort(dim=-1, descending=True, stable=True)
        src_Br, left = order_BA[:, :r], order_BA[:, r:]
        if num_prefix_tokens:
            left = left.sort(dim=-1).values[:, num_even_prefix:]
        odd = torch.arange(2 * num_odd_prefix + 1, num_tokens, 2, device=metric_BNC.device)
        prefix = torch.arange(num_prefix_tokens, device=metric_BNC.device)
        num_images = metric_BNC.shape[0]
        keep = torch.cat(
            [prefix.expand(num_images, -1), 2 * left, odd.expand(num_images, -1)], dim=1
        )
        first_odd = num_prefix_tokens + left.shape[1] - num_odd_prefix
        return Grouping(keep, 2 * src_Br, first_odd + partner_BA.gather(1, src_Br), num_tokens)


def kth_bipartite_matching(metric_BNC: Tensor, k: int) -> Grouping | None:
    """Merge every token but each k-th into the most similar one of the k-th tokens.

    Args:
        metric_BNC: What similarity is measured on.
        k: One token in k is left; at most 1: nothing merges.

    Returns:
        The grouping, or None if nothing merges.

    Source:
        ToMe, appendix D (alternating with larger strides); the authors' code.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    if k <= 1 or num_tokens < k:
        return None
    with torch.no_grad():
        metric_BNC = metric_BNC / metric_BNC.norm(dim=-1, keepdim=True)
        position = torch.arange(num_tokens, device=metric_BNC.device)
        complete = position < num_tokens // k * k
        target = position[complete & (position % k == k - 1)]
        source = position[complete & (position % k != k - 1)]
        scores = metric_BNC[:, source] @ metric_BNC[:, target].transpose(-1, -2)
        keep = torch.cat([target, position[~complete]])
        return Grouping(
            keep.expand(num_images, -1),
            source.expand(num_images, -1),
            scores.argmax(dim=-1),
            num_tokens,
        )
