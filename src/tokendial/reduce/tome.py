"""ToMe: merge similar tokens by bipartite soft matching.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
https://arxiv.org/abs/2210.09461, section 3 and appendix D (schedules), and the authors' code for
order and rounding. The family: bipartite soft matching; k-th bipartite matching, where one token
in `stride` absorbs; random bipartite matching, a baseline. Departures: any number of prefix tokens
is protected, where the code knows a class and a distillation token; k-th matching can merge fewer
tokens than it might, and merges those of an incomplete last group, where the code drops them;
random matching draws the same tokens for every image of a batch, so that an image does not depend
on its neighbours.
"""

# Shape legend: B batch, N tokens, C metric width, A tokens that may be absorbed, E that absorb.

import random
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_choice
from tokendial.kernels import fuses, most_similar_fused
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.listed import check_removed, dial_of_lists
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens

_MOST_SIMILARITIES = 2**18
"""How many are held at a time, for each image."""


@register("reduce", "tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(ReducerConfig):
    """Merge the `r` most similar token pairs in each layer, between attention and FFN."""

    r: int | list[int] | list[list[int]] | tuple[int, float] = 8
    """Tokens merged per layer: one number, a list (one entry per layer, missing ones are 0), a list
    of such lists (one for each degree from 1 up, from dear to cheap), or in Python a tuple
    (r, inflection), which sets both fields."""
    inflection: float = 0.0
    """Slope of the schedule over depth in [-1, 1]: 0 constant, 1 from 0 up to 2r, -1 from 2r
    down to 0. With one number r only."""
    proportional_attention: bool = True
    """Add the logarithm of token sizes to the attention logits."""
    matching: Literal["bipartite", "random"] = "bipartite"
    """Which tokens may be absorbed: fixed positions, the most similar first, or random ones."""
    stride: int = 2
    """One token in `stride` absorbs the others (k-th matching), so that up to (stride - 1) /
    stride of them can merge in one layer. With bipartite matching only."""
    seed: int = 0
    """Seed of random matching."""

    def __post_init__(self) -> None:
        check_matching(self.matching, self.stride, self.seed)
        if isinstance(self.r, tuple):
            if len(self.r) != 2 or self.inflection:
                raise ValueError(f"r as a tuple must be (r, inflection), got {self.r}.")
            object.__setattr__(self, "inflection", float(self.r[1]))
            object.__setattr__(self, "r", self.r[0])
        check_removed(self.r)
        if not -1.0 <= self.inflection <= 1.0:
            raise ValueError(f"inflection must lie in [-1, 1], got {self.inflection}.")
        if self.inflection and isinstance(self.r, list):
            raise ValueError("inflection needs one number r, got a list.")

    def build(self, vit: ViTShape) -> "ToMeReducer":
        """Make the module; a ValueError if lists do not fit the model, see `dial_of_lists`."""
        return ToMeReducer(self, vit)


class ToMeReducer(Reducer):
    """Runs ToMe. The degree is r; with lists of r, it is 0 (off), 1 (the first list), 2, ..."""

    needs = frozenset({"mean_keys"})
    tracks_size = True

    def __init__(self, config: ToMe, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.proportional_attention = config.proportional_attention
        if isinstance(config.r, list):
            most = partial(most_merged, stride=config.stride)
            self.schedules = dial_of_lists(config.r, vit, most)
            self.degrees, self.degree = tuple(range(len(self.schedules))), 1
        else:
            # No more can merge in one layer; more changes nothing.
            self.degrees = tuple(range(most_merged(vit.num_patches, config.stride) + 1))
            self.degree = int(config.r)  # type: ignore[arg-type]  # not a tuple after the checks
            self.schedules = [
                merge_schedule(degree, vit.depth, config.inflection) for degree in self.degrees
            ]

    def acts(self, layer: int, degree: int) -> bool:
        """Whether the schedule merges anything in `layer`."""
        return self.schedules[degree][layer - 1] > 0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Merge along the keys of this layer."""
        assert attended.mean_keys is not None
        config = self.config
        return matched(
            attended.mean_keys,
            self.schedules[degree][layer - 1],
            tokens.prefix,
            matching=config.matching,
            stride=config.stride,
            seed=(config.seed, layer),
        )


def merge_schedule(r: int, depth: int, inflection: float = 0.0) -> list[int]:
    """Tokens merged in each of `depth` layers.

    Args:
        r: The mean over layers.
        depth: Number of layers.
        inflection: 0 constant, 1 increasing from 0 to 2r, -1 decreasing from 2r to 0.

    Example:
        >>> merge_schedule(8, 4, inflection=-1.0)
        [16, 10, 5, 0]
    """
    first = int(r * (1.0 - inflection))
    step = (2 * r - 2 * first) / (depth - 1) if depth > 1 else 0.0
    return [int(first + step * layer) for layer in range(depth)]


def most_merged(num_patches: int, stride: int = 2) -> int:
    """How many of the unprotected tokens can merge in one step: half of them at stride 2."""
    return num_patches * (stride - 1) // stride if num_patches >= stride else 0


def check_matching(matching: str, stride: int, seed: int) -> None:
    """Raise a ValueError unless the settings of a matching make sense."""
    check_choice("matching", matching, ("bipartite", "random"))
    if type(stride) is not int or stride < 2:
        raise ValueError(f"stride must be an integer of at least 2, got {stride}.")
    if stride != 2 and matching == "random":
        raise ValueError(f"stride goes with bipartite matching, got {stride} with random.")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed}.")


def matched(
    metric_BNC: Tensor,
    r: int,
    num_prefix_tokens: int,
    *,
    matching: str,
    stride: int,
    seed: tuple[int, ...],
) -> Grouping | None:
    """Merge `r` tokens by bipartite or random matching; None if nothing merges."""
    if matching == "random":
        return random_matching(metric_BNC, r, num_prefix_tokens=num_prefix_tokens, seed=seed)
    return bipartite_matching(metric_BNC, r, num_prefix_tokens=num_prefix_tokens, stride=stride)


def bipartite_matching(
    metric_BNC: Tensor, r: int, *, num_prefix_tokens: int = 0, stride: int = 2
) -> Grouping | None:
    """Match tokens with their most similar `stride`-th token and merge the `r` best pairs.

    Args:
        metric_BNC: What similarity is measured on (keys, mean over heads).
        r: Tokens to merge; capped at `most_merged` of the unprotected ones.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.
        stride: The tokens at positions stride - 1, 2 * stride - 1, ... absorb the others. 2 is
            ToMe's split into even and odd tokens; with larger ones and the largest r it is k-th
            matching.

    Returns:
        The grouping, or None if nothing merges. Order of the new tokens: prefix, tokens of the
        absorbed set that are left, tokens that absorb.

    Source:
        ToMe, appendix D. As in the authors' code the even tokens that are left keep their image
        order when there is a prefix token, and run from most to least similar when there is none.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    r = min(r, most_merged(num_tokens - num_prefix_tokens, stride))
    if r <= 0:
        return None
    device = metric_BNC.device
    metric_BNC = metric_BNC.detach()
    target = torch.arange(stride - 1, num_tokens, stride, device=device)
    number = torch.arange(num_tokens - target.shape[0], device=device)
    source = number + number.div(stride - 1, rounding_mode="floor")
    targets_in_prefix = num_prefix_tokens // stride
    sources_in_prefix = num_prefix_tokens - targets_in_prefix
    best_BA, partner_BA = _most_similar(metric_BNC, source, target, targets_in_prefix)
    best_BA[:, :sources_in_prefix] = -torch.inf
    order_BA = best_BA.argsort(dim=-1, descending=True, stable=True)
    merged, left = order_BA[:, :r], order_BA[:, r:]
    if num_prefix_tokens:
        left = left.sort(dim=-1).values[:, sources_in_prefix:]
    prefix = torch.arange(num_prefix_tokens, device=device).expand(num_images, -1)
    absorbing = target[targets_in_prefix:].expand(num_images, -1)
    keep = torch.cat([prefix, source[left], absorbing], dim=1)
    first = num_prefix_tokens + left.shape[1] - targets_in_prefix
    return Grouping(keep, source[merged], first + partner_BA.gather(1, merged), num_tokens)


def random_matching(
    metric_BNC: Tensor, r: int, *, num_prefix_tokens: int = 0, seed: tuple[int, ...] = (0,)
) -> Grouping | None:
    """Merge `r` tokens, drawn at random, into the most similar of the others: a baseline.

    Args:
        metric_BNC: What similarity is measured on.
        r: Tokens to merge; capped at half of the unprotected ones.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.
        seed: Decides which tokens; they are the same for each image.

    Returns:
        The grouping, or None if nothing merges. The new tokens keep their image order.

    Source:
        ToMe, table 1 (random partition); the authors' code.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    num_free = num_tokens - num_prefix_tokens
    r = min(r, most_merged(num_free))
    if r <= 0:
        return None
    metric_BNC = metric_BNC.detach()
    drawn = torch.tensor(_draw(seed, num_free), device=metric_BNC.device)
    order = num_prefix_tokens + drawn
    source, target = order[:r], order[r:].sort().values
    partner_Br = _most_similar(metric_BNC, source, target)[1]
    prefix = torch.arange(num_prefix_tokens, device=metric_BNC.device)
    keep = torch.cat([prefix, target]).expand(num_images, -1)
    src = source.expand(num_images, -1)
    return Grouping(keep, src, num_prefix_tokens + partner_Br, num_tokens)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _draw(seed: tuple[int, ...], count: int) -> list[int]:
    """A permutation of `count` numbers, the same on every device and in every process."""
    return random.Random(f"{seed} {count}").sample(range(count), count)


def _most_similar(
    metric_BNC: Tensor, source: Tensor, target: Tensor, passed_by: int = 0
) -> tuple[Tensor, Tensor]:
    """The highest cosine of each source with a target, and which one that is; [B, sources] each.

    In float32, so that half precision does not blur the order. The first `passed_by` targets are
    nobody's.
    """
    device = metric_BNC.device.type
    # Under autocast products would be in half precision whatever the metric is. The meta device, on
    # which costs are counted, does not know autocast.
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _most_similar(metric_BNC, source, target, passed_by)
    metric_BNC = metric_BNC.float()
    unit = metric_BNC / torch.linalg.vector_norm(metric_BNC, dim=-1, keepdim=True)
    if fuses(unit):
        return most_similar_fused(unit, source, target, passed_by)
    sources, targets = unit[:, source], unit[:, target].transpose(-1, -2)
    found = []
    # Some sources at a time: all similarities of a large image would take more than its features.
    rows = max(1, _MOST_SIMILARITIES // targets.shape[2])
    for some in sources.chunk(-(-sources.shape[1] // rows), dim=1):
        scores = some @ targets
        scores[:, :, :passed_by] = -torch.inf
        found.append(scores.max(dim=-1))
    best, partner = zip(*found, strict=True)
    return torch.cat(best, dim=1), torch.cat(partner, dim=1)
