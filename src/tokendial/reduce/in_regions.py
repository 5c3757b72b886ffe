"""Reduction in regions of any shape: what `InWindows` does where `regions` are given.

The patches of a region stand together from the first block on, and the method reduces each region
as if it were an image of its own. How many tokens a region has in a layer follows from the schedule
alone, so that every degree still compiles and exports as one graph.
"""

# Shape legend: B images, N tokens (prefix + patch), R regions.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.schedules import PerLayer, ScheduledConfig, patches_after_layers
from tokendial.reduce.tome import ToMe, merge_schedule
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


class InRegionsReducer(Reducer):
    """Runs a method in each region of the image. The dial is that of the method in whole images."""

    reads_grid_shape = True
    protects = False

    def __init__(
        self, reduce: ReducerConfig, regions: Sequence[Sequence[int]], vit: ViTShape
    ) -> None:
        super().__init__()
        self.grid = len(regions), len(regions[0])
        """Rows and columns of patches."""
        numbers = [number for row in regions for number in row]
        if len(numbers) != vit.num_patches:
            raise ValueError(
                f"regions must number each of the {vit.num_patches} patches, got {self._shape()}."
            )
        if not isinstance(reduce, ScheduledConfig) or reduce.r is None:
            raise ValueError(f"regions need a method that removes tokens by r, got {reduce}.")
        dial, self.degree = _dial(reduce, vit)
        self.degrees = tuple(range(1 + len(dial)))
        shares = [PerLayer(removed / vit.num_patches for removed in layers) for layers in dial]
        sizes = [count for _, count in sorted(Counter(numbers).items())]
        self._sizes = [_sizes_of_region(reduce, size, shares, vit.depth) for size in sizes]
        """Patch tokens that enter each layer, and that leave the last: [R][degree][layer - 1]."""
        each = reduce.with_schedules(shares)
        self.inner = nn.ModuleList(each.build(replace(vit, num_patches=size)) for size in sizes)
        """The method in each region."""
        if any(True for _ in self.inner.parameters()):
            raise ValueError(f"regions need a method without weights, got {type(reduce).__name__}.")
        first = self.inner[0]
        assert isinstance(first, Reducer)
        self.needs, self.tracks_size = first.needs, first.tracks_size
        self.proportional_attention = first.proportional_attention
        self._order = sorted(range(len(numbers)), key=numbers.__getitem__)

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the method reduces any region in `layer`."""
        return any(s[degree][layer] < s[degree][layer - 1] for s in self._sizes)

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Put the patches of each region together before the first block.

        Raises:
            ValueError: If the image has other rows and columns of patches.
        """
        if layer > 1:
            return tokens
        if tokens.grid != self.grid:
            raise ValueError(
                f"regions must have the image's {tokens.grid[0]} x {tokens.grid[1]} patches, got "
                f"{self._shape()}."
            )
        order = torch.tensor(self._order, device=tokens.x.device)
        return tokens.reordered(order.expand(tokens.x.shape[0], -1))

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Let the method group each region, and join the groupings."""
        regions, groupings, first = [], [], tokens.prefix
        for reducer, sizes in zip(self.inner, self._sizes, strict=True):
            region = _Region(tokens.prefix, first, sizes[degree][layer - 1])
            assert isinstance(reducer, Reducer)
            grouping = None
            if sizes[degree][layer] < region.size:
                seen = replace(
                    tokens, x=region.rows(tokens.x), size=region.optional_rows(tokens.size)
                )
                grouping = reducer.group(layer, degree, seen, region.by_products(attended))
            regions.append(region)
            groupings.append(grouping or region.unchanged(tokens.x))
            first += region.size
        return _joined(groupings, regions, first)

    def _shape(self) -> str:
        return f"{self.grid[0]} x {self.grid[1]}"


def _dial(reduce: ScheduledConfig, vit: ViTShape) -> tuple[list[list[int]], int]:
    """Tokens that each layer removes of a whole image at degree 1, 2, ..., and the degree of r."""
    if listed := reduce.schedules(vit):
        return listed, 1
    inflection = reduce.inflection if isinstance(reduce, ToMe) else 0.0
    highest = min(vit.num_patches // 2, reduce.max_removed(vit.num_patches))
    return [merge_schedule(r, vit.depth, inflection) for r in range(1, highest + 1)], reduce.r


def _sizes_of_region(
    reduce: ScheduledConfig, size: int, shares: list[PerLayer], depth: int
) -> list[list[int]]:
    """Patch tokens of a region before the first layer, and after each, at degree 0, 1, ..."""
    return [[size] * (depth + 1)] + [
        [size, *patches_after_layers(size, of_degree.counts(size), reduce.max_removed)]
        for of_degree in shares
    ]


@dataclass(frozen=True, slots=True)
class _Region:
    """Where the tokens of a region stand. It is seen with the prefix tokens before it."""

    prefix: int
    """Number of prefix tokens."""
    first: int
    """Its first token."""
    size: int
    """Number of its tokens."""

    def rows(self, values: Tensor) -> Tensor:
        """The rows [B, P + size, ...] of its tokens of [B, N, ...]."""
        return torch.cat(
            [values[:, : self.prefix], values[:, self.first : self.first + self.size]], dim=1
        )

    def optional_rows(self, values: Tensor | None) -> Tensor | None:
        """The same, or None."""
        return None if values is None else self.rows(values)

    def by_products(self, attended: ByProducts) -> ByProducts:
        """The by-products that have a row per token; reduction methods read no others."""
        return ByProducts(
            mean_keys=self.optional_rows(attended.mean_keys),
            class_attention=self.optional_rows(attended.class_attention),
            mean_attention=self.optional_rows(attended.mean_attention),
            shift=self.optional_rows(attended.shift),
        )

    def unchanged(self, x_BND: Tensor) -> Grouping:
        """A reduction that keeps all of its tokens."""
        count = self.prefix + self.size
        keep = torch.arange(count, device=x_BND.device).expand(x_BND.shape[0], -1)
        return Grouping.keep_only(keep, count)


def _joined(groupings: list[Grouping], regions: list[_Region], num_tokens: int) -> Grouping:
    """The groupings of all regions as one of the whole image, in the order of the regions."""
    for grouping in groupings:
        if type(grouping) is not Grouping:
            raise ValueError(
                "this method changes tokens as they merge, which it cannot do in regions."
            )
    prefix, weights = regions[0].prefix, [grouping.weight for grouping in groupings]
    keep = [groupings[0].keep[:, :prefix]]
    src, dst, fused, shares = [], [], [], []
    new_first = prefix
    for grouping, region in zip(groupings, regions, strict=True):
        to_old, to_new = region.first - prefix, new_first - prefix
        keep.append(grouping.keep[:, prefix:] + to_old)
        src.append(grouping.src + to_old)
        dst.append(grouping.dst + to_new)
        if grouping.fused is not None:
            fused.append(grouping.fused + to_new)
        if grouping.absorbed_share is not None:
            shares.append(grouping.absorbed_share)
        new_first += grouping.keep.shape[1] - prefix
    joined = Grouping(
        keep=torch.cat(keep, dim=1),
        src=torch.cat(src, dim=1),
        dst=torch.cat(dst, dim=1),
        num_tokens=num_tokens,
        how=next((each.how for each in groupings if each.src.shape[1]), "mean"),
        fused=torch.cat(fused, dim=1) if fused else None,
        absorbed_share=torch.cat(shares, dim=1) if shares else None,
    )
    if (given := next((weight for weight in weights if weight is not None), None)) is not None:
        # A token that stays alone is its own mean, or itself times 1.
        each = [
            given.new_ones(given.shape[0], region.size) if weight is None else weight[:, prefix:]
            for weight, region in zip(weights, regions, strict=True)
        ]
        joined.weight = torch.cat([given[:, :prefix], *each], dim=1)
    return joined
