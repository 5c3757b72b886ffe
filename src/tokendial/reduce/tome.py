"""ToMe: merge similar tokens by bipartite soft matching.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
https://arxiv.org/abs/2210.09461, section 3 and appendix D (schedules), and the authors' code for
order and rounding. Three ways of matching: bipartite soft matching; k-th bipartite matching, in
which one token in `stride` absorbs others; random bipartite matching, a baseline.

Departures: any number of prefix tokens is protected (the authors' code: a class and a distillation
token). K-th matching accepts every r up to its maximum, and merges the tokens of an incomplete last
group (the authors' code always merges the maximum, and drops these tokens). Random matching draws
the same positions for every image of a batch, so that an image does not depend on its neighbours.
"""

# Shape legend: B batch, N tokens, C metric width, A tokens that may be absorbed, E that absorb.

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_choice, check_count
from tokendial.kernels import find_most_similar_fused, should_fuse
from tokendial.methods import register
from tokendial.reduce.base import Reducer
from tokendial.reduce.schedules import ScheduledConfig, freeze_removal, make_schedule_dial
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens

MAX_SIMILARITIES = 2**18
"""Number of similarities per image that are in memory at a time."""
T = TypeVar("T")


@register("reduce", "tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(ScheduledConfig):
    """ToMe: merge the `r` most similar pairs of tokens in each layer, between attention and FFN."""

    r: int | Sequence[int | float] | Sequence[Sequence[int | float]] | tuple[int, float] = 8
    """Tokens that each layer merges: one number for all layers; a list with one number per layer
    (missing last layers merge none); or a list of such lists, one for each degree from 1 up, from
    the most to the least expensive. In a list, a float is a share of the image's patches: 0.05 of
    196 are 10 tokens. In Python, a tuple (r, inflection) sets both fields."""
    inflection: float = 0.0
    """Slope of `r` over the layers, in [-1, 1]: 0 merges `r` tokens in each layer, 1 merges from 0
    in the first to 2r in the last layer, -1 from 2r to 0. Needs `r` to be one number."""
    proportional_attention: bool = True
    """Whether attention adds the logarithm of the token sizes to its logits, so that a merged token
    counts as much as the patches that it stands for."""
    matching: Literal["bipartite", "random"] = "bipartite"
    """How pairs are chosen: "bipartite" merges the most similar pairs of two fixed sets of
    positions; "random" (a baseline) merges tokens at random positions."""
    stride: int = 2
    """One token in `stride` absorbs others (k-th matching), so a layer can merge up to
    (stride - 1) / stride of its tokens. At least 2; "random" matching needs 2."""
    seed: int = 0
    """Seed that draws the positions for "random" matching."""
    sizes: Literal["count", "similarity"] = "count"
    """What a token adds to the size of the one that absorbs it: its size ("count"), or its size
    times their similarity ("similarity", of DiffRate), so that attention counts an unlike token
    less."""

    def __post_init__(self) -> None:
        check_matching(self.matching, self.stride, self.seed)
        check_choice("sizes", self.sizes, ("count", "similarity"))
        # A plain tuple of numbers is (r, inflection). Lists become `PerLayer` below, so that
        # dataclasses.replace does not mistake one for such a tuple.
        if type(self.r) is tuple and not any(isinstance(part, list | tuple) for part in self.r):
            if len(self.r) != 2:
                raise ValueError(f"r as a tuple must be (r, inflection), got {self.r}.")
            object.__setattr__(self, "inflection", self.r[1])
            object.__setattr__(self, "r", self.r[0])
        object.__setattr__(self, "r", freeze_removal(self.r))
        if type(self.inflection) not in (int, float) or not -1.0 <= self.inflection <= 1.0:
            raise ValueError(f"inflection must lie in [-1, 1], got {self.inflection!r}.")
        object.__setattr__(self, "inflection", float(self.inflection))
        if self.inflection and not isinstance(self.r, int):
            raise ValueError(
                f"inflection must be 0 where r is a list, got {self.inflection} and r={self.r}."
            )

    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can merge of `num_patches`."""
        return max_merged(num_patches, self.stride)

    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> "ToMe":
        """The same method with these schedules as its degrees 1, 2, ..."""
        return replace(self, r=[list(each) for each in schedules], inflection=0.0)

    def build(self, vit: ViTShape) -> "ToMeReducer":
        """Make the module. Raises a ValueError if lists do not fit, see `make_schedule_dial`."""
        return ToMeReducer(self, vit)


class ToMeReducer(Reducer):
    """Runs ToMe.

    With one number r the degree is r. With lists of r, degree 0 merges nothing, degree 1 follows
    the first list, and so on.
    """

    needs = frozenset({"mean_keys"})
    tracks_size = True

    def __init__(self, config: ToMe, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.proportional_attention = config.proportional_attention
        r = freeze_removal(config.r)
        if isinstance(r, int):
            # The dial ends where a larger r changes nothing: no more tokens can merge in a layer.
            self.degrees = tuple(range(max_merged(vit.num_patches, config.stride) + 1))
            self.degree = r
            self.schedules = [
                merge_schedule(degree, vit.depth, config.inflection) for degree in self.degrees
            ]
        else:
            self.schedules = make_schedule_dial(r, vit, config.max_removed)
            self.degrees, self.degree = tuple(range(len(self.schedules))), 1

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the schedule merges tokens in `layer`."""
        return self.schedules[degree][layer - 1] > 0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Match the tokens by the similarity of their keys in this layer."""
        assert attended.mean_keys is not None
        config = self.config
        return match_tokens(
            attended.mean_keys,
            self.schedules[degree][layer - 1],
            tokens.prefix,
            matching=config.matching,
            stride=config.stride,
            seed=(config.seed, layer),
            weigh_sizes=config.sizes == "similarity",
        )


def merge_schedule(r: int, depth: int, inflection: float = 0.0) -> list[int]:
    """Return the tokens to merge in each of `depth` layers.

    Args:
        r: Mean number of tokens per layer.
        depth: Number of layers.
        inflection: 0: r in each layer; 1: rising from 0 to 2r; -1: falling from 2r to 0.

    Example:
        >>> merge_schedule(8, 4, inflection=-1.0)
        [16, 10, 5, 0]
    """
    first = int(r * (1.0 - inflection))
    step = (2 * r - 2 * first) / (depth - 1) if depth > 1 else 0.0
    return [int(first + step * layer) for layer in range(depth)]


def max_merged(num_patches: int, stride: int = 2) -> int:
    """Largest number of tokens that one layer can merge.

    Args:
        num_patches: Tokens in the layer that are not protected.
        stride: One token in `stride` absorbs, so the others can merge: half of them at stride 2.
    """
    return num_patches * (stride - 1) // stride if num_patches >= stride else 0


def check_matching(matching: str, stride: int, seed: int) -> None:
    """Raise a ValueError unless the settings describe a matching."""
    check_choice("matching", matching, ("bipartite", "random"))
    check_count("stride", stride, at_least=2)
    if stride != 2 and matching == "random":
        raise ValueError(f"stride must be 2 with random matching, got {stride}.")
    check_count("seed", seed, at_least=0)


def match_tokens(
    metric_BNC: Tensor,
    r: int,
    num_prefix_tokens: int,
    *,
    matching: str,
    stride: int,
    seed: tuple[int, ...],
    weigh_sizes: bool = False,
) -> Grouping | None:
    """Return the grouping that merges `r` tokens, or None if nothing merges.

    See `bipartite_matching` and `random_matching`.
    """
    if matching == "random":
        return random_matching(
            metric_BNC,
            r,
            num_prefix_tokens=num_prefix_tokens,
            seed=seed,
            weigh_sizes=weigh_sizes,
        )
    return bipartite_matching(
        metric_BNC,
        r,
        num_prefix_tokens=num_prefix_tokens,
        stride=stride,
        weigh_sizes=weigh_sizes,
    )


def bipartite_matching(
    metric_BNC: Tensor,
    r: int,
    *,
    num_prefix_tokens: int = 0,
    stride: int = 2,
    weigh_sizes: bool = False,
) -> Grouping | None:
    """Match tokens with their most similar `stride`-th token and merge the `r` best pairs.

    Args:
        metric_BNC: Features whose cosine is the similarity (keys, mean over heads).
        r: Tokens to merge, at most `max_merged` of the unprotected ones.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.
        stride: The tokens at positions stride - 1, 2 * stride - 1, ... absorb others. 2 is ToMe's
            split into even and odd tokens. A larger stride with the largest r is k-th matching.
        weigh_sizes: Whether the sizes of absorbed tokens count by their similarity.

    Returns:
        The grouping, or None if nothing merges. Order of the new tokens: prefix tokens, unmerged
        tokens of the set that may be absorbed, tokens of the set that absorbs.

    Source:
        ToMe, appendix D. As in the authors' code, unmerged even tokens keep their image order if
        there is a prefix token, and stand from most to least similar if there is none.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    r = min(r, max_merged(num_tokens - num_prefix_tokens, stride))
    if r <= 0:
        return None
    device = metric_BNC.device
    sources_in_prefix = num_prefix_tokens - num_prefix_tokens // stride
    first_target = num_prefix_tokens + (stride - 1 - num_prefix_tokens) % stride
    target = torch.arange(first_target, num_tokens, stride, device=device)
    source: slice | Tensor
    if stride == 2:
        source = slice(2 * sources_in_prefix, None, 2)  # needs no copy
    else:
        num_sources = num_tokens - num_prefix_tokens - target.shape[0]
        number = sources_in_prefix + torch.arange(num_sources, device=device)
        source = number + number // (stride - 1)
    best_BA, partner_BA = find_most_similar(
        metric_BNC.detach(), source, slice(first_target, None, stride)
    )
    order_BA = best_BA.argsort(dim=-1, descending=True, stable=True)
    if isinstance(source, slice):
        position_BA = 2 * (order_BA + sources_in_prefix)
    else:
        position_BA = source[order_BA]
    left = position_BA[:, r:]
    if num_prefix_tokens:
        left = left.sort(dim=-1).values
    prefix = torch.arange(num_prefix_tokens, device=device).expand(num_images, -1)
    keep = torch.cat([prefix, left, target.expand(num_images, -1)], dim=1)
    first = num_prefix_tokens + left.shape[1]
    merged = order_BA[:, :r]
    dst = first + partner_BA.gather(1, merged)
    grouping = Grouping(keep, position_BA[:, :r], dst, num_tokens)
    if weigh_sizes:
        grouping.absorbed_share = best_BA.gather(1, merged).clamp(min=0.0)
    return grouping


def random_matching(
    metric_BNC: Tensor,
    r: int,
    *,
    num_prefix_tokens: int = 0,
    seed: tuple[int, ...] = (0,),
    weigh_sizes: bool = False,
) -> Grouping | None:
    """Draw `r` tokens at random and merge each into the most similar of the other tokens.

    Args:
        metric_BNC: Features whose cosine is the similarity.
        r: Tokens to merge, at most half of the unprotected ones.
        num_prefix_tokens: Leading tokens that neither absorb nor are absorbed.
        seed: Numbers that seed the draw. The drawn positions are the same for every image.
        weigh_sizes: Whether the sizes of absorbed tokens count by their similarity.

    Returns:
        The grouping, or None if nothing merges. The new tokens keep their image order.

    Source:
        ToMe, table 1 (random partition); the authors' code.
    """
    num_images, num_tokens, _ = metric_BNC.shape
    num_free = num_tokens - num_prefix_tokens
    r = min(r, max_merged(num_free))
    if r <= 0:
        return None
    metric_BNC = metric_BNC.detach()
    drawn = torch.tensor(_random_permutation(seed, num_free), device=metric_BNC.device)
    order = num_prefix_tokens + drawn
    source, target = order[:r], order[r:].sort().values
    similarity_Br, partner_Br = find_most_similar(metric_BNC, source, target)
    prefix = torch.arange(num_prefix_tokens, device=metric_BNC.device)
    keep = torch.cat([prefix, target]).expand(num_images, -1)
    src = source.expand(num_images, -1)
    grouping = Grouping(keep, src, num_prefix_tokens + partner_Br, num_tokens)
    if weigh_sizes:
        grouping.absorbed_share = similarity_Br.clamp(min=0.0)
    return grouping


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _random_permutation(seed: tuple[int, ...], count: int) -> list[int]:
    """Return a permutation of `count` numbers, the same on every device and in every process."""
    return random.Random(f"{seed} {count}").sample(range(count), count)


def in_float32(function: Callable[..., T]) -> Callable[..., T]:
    """Make a function of a metric [B, N, C] compute in float32 even inside autocast.

    Autocast would compute products in half precision, where many similarities are equal.
    """

    @functools.wraps(function)
    def wrapped(metric_BNC: Tensor, *args: Any, **kwargs: Any) -> T:
        device = metric_BNC.device.type
        # The meta device, on which costs are counted, has no autocast.
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(metric_BNC, *args, **kwargs)
        return function(metric_BNC, *args, **kwargs)

    return wrapped


def find_most_similar(
    metric_BNC: Tensor, source: slice | Tensor, target: slice | Tensor
) -> tuple[Tensor, Tensor]:
    """Find the most similar target of each source.

    Similarities are computed in float32: in half precision many would be equal.

    Args:
        metric_BNC: Features whose cosine is the similarity.
        source: Positions of the tokens that may be absorbed.
        target: Positions of the tokens that absorb.

    Returns:
        The highest cosine of each source, and the number of that target among the targets;
        [B, sources] each.
    """
    device = metric_BNC.device.type
    # As `in_float32`, without one more call in every layer.
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return find_most_similar(metric_BNC, source, target)
    metric_BNC = metric_BNC.float()
    unit = metric_BNC / torch.linalg.vector_norm(metric_BNC, dim=-1, keepdim=True)
    if should_fuse(unit):
        positions = torch.arange(unit.shape[1], device=unit.device)
        return find_most_similar_fused(unit, positions[source], positions[target])
    if torch.compiler.is_exporting():  # other runtimes copy rows faster by a list than by a step
        positions = torch.arange(unit.shape[1], device=unit.device)
        source, target = positions[source], positions[target]
        sources, targets = unit.index_select(1, source), unit.index_select(1, target)
    else:
        sources, targets = unit[:, source], unit[:, target]
    if sources.shape[1] * targets.shape[1] <= MAX_SIMILARITIES:
        best, partner = (sources @ targets.transpose(-1, -2)).max(dim=-1)
        return best, partner
    return best_partners(sources, targets)


def best_partners(
    sources_BAC: Tensor,
    targets_BEC: Tensor,
    factor_BE: Tensor | None = None,
    hidden_BE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Highest product of each source with a target, and the number of that target; [B, A] each.

    Args:
        sources_BAC: Features of the sources.
        targets_BEC: Features of the targets.
        factor_BE: What the products with each target are multiplied by; None: 1.
        hidden_BE: True for targets that no source is to find; None: there are none.
    """
    targets = targets_BEC.transpose(-1, -2)

    # All similarities of a large image would take more memory than its features, so they are
    # computed for a chunk of the sources at a time.
    chunk_size = max(1, MAX_SIMILARITIES // targets.shape[2])
    best, partner = [], []
    for chunk in torch.split(sources_BAC, chunk_size, dim=1):
        products = chunk @ targets
        if factor_BE is not None:
            products = products * factor_BE[:, None]
        if hidden_BE is not None:
            products = products.masked_fill(hidden_BE[:, None], -torch.inf)
        found = products.max(dim=-1)
        best.append(found.values)
        partner.append(found.indices)
    if len(best) == 1:
        return best[0], partner[0]
    return torch.cat(best, dim=1), torch.cat(partner, dim=1)
