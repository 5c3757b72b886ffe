"""Reduction methods that need no training, each set to a wanted share of the full cost."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import tokendial as td
from tokendial.reduce import ReducerConfig

COSTS = (0.9, 0.8, 0.7, 0.6)
"""Wanted multiply-accumulates, as shares of those at degree 0."""
_KEEP_RATES = tuple(percent / 100 for percent in range(99, 4, -1))


def _tome(patches: int, **settings: Any) -> list[ReducerConfig]:
    return [td.ToMe(r=r, **settings) for r in range(1, patches // 2 + 1)]


def _pitome(patches: int) -> list[ReducerConfig]:
    return [td.PiToMe(r=r) for r in range(1, patches // 2 + 1)]


def _prune_merge(patches: int) -> list[ReducerConfig]:
    return [td.PruneMerge(r=r) for r in range(1, patches // 2 + 1)]


def _ffn_merge(patches: int) -> list[ReducerConfig]:
    """Half of the tokens can merge with a stride of 2; a stride of 4 goes on from there."""
    half = patches // 2
    return [td.FFNMerge(r=r, stride=2 if r <= half else 4) for r in range(1, 3 * patches // 4 + 1)]


def _evit_layers(patches: int, **settings: Any) -> list[ReducerConfig]:
    return [td.EViT(keep_rate=rate, **settings) for rate in _KEEP_RATES]


def _evit_each(patches: int, **settings: Any) -> list[ReducerConfig]:
    return [td.EViT(r=r, **settings) for r in range(1, patches // 2 + 1)]


FAMILIES: dict[str, Callable[[int], list[ReducerConfig]]] = {
    "ToMe": _tome,
    "ToMe, random pairs": functools.partial(_tome, matching="random"),
    "ToMe, sizes by similarity": functools.partial(_tome, sizes="similarity"),
    "PiToMe": _pitome,
    "PruneMerge, half dropped": _prune_merge,
    "FFN merging": _ffn_merge,
    "EViT in 3 layers, fuse": _evit_layers,
    "EViT in 3 layers, drop": functools.partial(_evit_layers, rest="drop"),
    "EViT in 3 layers by shift, fuse": functools.partial(_evit_layers, score="shift"),
    "EViT in each layer, fuse": _evit_each,
    "EViT in each layer, drop": functools.partial(_evit_each, rest="drop"),
}
"""For each method, its settings in falling order of their cost, for a number of patches."""


@dataclass(frozen=True)
class Reduction:
    """A reduction method with its setting. The default reduces nothing."""

    family: str = "none"
    """Name of the method, one of `FAMILIES`."""
    wanted: float = 1.0
    """Wanted cost, as a share of the cost at degree 0."""

    @property
    def name(self) -> str:
        """Name for files."""
        words = f"{self.family}-{100 * self.wanted:.0f}"
        return words.lower().replace(",", "").replace(" ", "_")


def reductions(families: Sequence[str]) -> list[Reduction]:
    """No reduction, and each method at each cost of `COSTS`."""
    return [Reduction(), *(Reduction(family, cost) for family in families for cost in COSTS)]


def nearest(share_at: Callable[[int], float], count: int, wanted: float) -> int:
    """Position of the value nearest to `wanted` among `count` falling values.

    Args:
        share_at: Gives the value at a position. It is called about log2(count) times.
        count: Number of values, at least 1.
        wanted: The value to come near to. Of two equally near values, the larger one is taken.
    """
    low, high = 0, count - 1  # the first value at or below `wanted`, or the last one
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share_at(middle) <= wanted else (middle + 1, high)
    before = max(0, low - 1)
    return before if share_at(before) - wanted <= abs(share_at(low) - wanted) else low


def reduce_config(
    reduction: Reduction, vit: nn.Module, decode: td.DecoderConfig | None = None
) -> tuple[ReducerConfig | None, float]:
    """The setting of a reduction in a backbone, and its cost as a share of that at degree 0.

    Args:
        reduction: The method and the wanted cost.
        vit: The backbone, without a head if there is a decoder.
        decode: Decoder whose cost counts, too.
    """
    if reduction.family == "none":
        return None, 1.0
    full = td.wrap(vit, decode=decode)
    settings = FAMILIES[reduction.family](full.anatomy.shape.num_patches)
    whole = full.cost().macs
    full.release_backbone()

    @functools.cache
    def share_at(position: int) -> float:
        model = td.wrap(vit, reduce=settings[position], decode=decode)
        macs = model.cost().macs
        model.release_backbone()
        return macs / whole

    best = nearest(share_at, len(settings), reduction.wanted)
    return settings[best], share_at(best)
