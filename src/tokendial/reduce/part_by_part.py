"""What FrameByFrame and InWindows share: a method reduces parts of the tokens separately.

The parts stand one after another and have the same number of tokens. The method receives each part
as if it were an image of its own, so that every part loses the same number of tokens. Attention
still reads all of them.
"""

# Shape legend: B images or clips, G parts, N tokens of an image or clip, P prefix tokens,
# D embed_dim.

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.methods import from_json
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


def read_inner(reduce: Any, method: str) -> ReducerConfig:
    """The method to run in each part, from its settings or their plain-JSON form.

    Args:
        reduce: The settings.
        method: Name of the method that runs it, for error messages.

    Raises:
        ValueError: If it is no method, runs another method itself, or decides on each token alone.
    """
    if isinstance(reduce, dict):
        reduce = from_json("reduce", reduce)
    if not isinstance(reduce, ReducerConfig) or hasattr(reduce, "reduce"):
        raise ValueError(f"reduce must be another reduction method, got {reduce!r}.")
    if getattr(reduce, "selection", None) == "threshold":
        raise ValueError(
            f"reduce: {type(reduce).__name__} by threshold decides on each token separately, so "
            f"{method} would change nothing: leave {method} out."
        )
    return reduce


class PartByPartReducer(Reducer):
    """Runs the inner method on each part. The dial is that of the inner method."""

    def __init__(self, reduce: ReducerConfig, vit: ViTShape, num_parts: int) -> None:
        super().__init__()
        part = replace(vit, num_patches=vit.num_patches // num_parts, num_grids=1)
        self.inner: Reducer = reduce.build(part)
        self.needs, self.extra_passes = self.inner.needs, self.inner.extra_passes
        self.tracks_size = self.inner.tracks_size
        self.keeps_grid = self.inner.keeps_grid
        self.reads_grid_shape = self.inner.reads_grid_shape
        self.protects = False
        self.proportional_attention = self.inner.proportional_attention
        self.degrees, self.degree = self.inner.degrees, self.inner.degree

    def parts(self, tokens: Tokens) -> Tokens:
        """The tokens with `grids` and `grid` as the inner method is to see them."""
        return tokens

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the inner method reduces in `layer`."""
        return self.inner.reduces_in(layer, degree)

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Let the inner method prepare the tokens of each part."""
        parts = self.parts(tokens)
        prepared = self.inner.before_block(layer, degree, _split_parts(parts))
        return replace(_join_parts(prepared, parts.grids), grid=tokens.grid, grids=tokens.grids)

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Let the inner method group each part, and join the groupings."""
        parts = self.parts(tokens)
        seen = _split_by_products(attended, parts)
        grouping = self.inner.group(layer, degree, _split_parts(parts), seen)
        return None if grouping is None else _join_groupings(grouping, parts)

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None] | None:
        """Let the inner method run the FFN on each part."""
        parts = self.parts(tokens)
        seen = _split_by_products(attended, parts)
        result = self.inner.around_ffn(layer, degree, _split_parts(parts), seen, ffn)
        if result is None:
            return None
        x, selected = result
        if selected is not None:
            selected = _join_rows(selected, parts.grids, parts.prefix)
        return _join_rows(x, parts.grids, parts.prefix), selected

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the inner method's losses; their fractions of tokens are those of all parts."""
        return self.inner.losses(passes)

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Pass the step on to the inner method."""
        self.inner.at_step(step, steps_per_epoch)


def _split_parts(tokens: Tokens) -> Tokens:
    """Make each part a sequence: [B, N, ...] to [B * G, P + (N - P) / G, ...].

    Prefix tokens belong to the whole image or clip, so each part gets a copy of them.
    """
    grids, prefix, origin = tokens.grids, tokens.prefix, tokens.origin
    tokens_per_part = (tokens.x.shape[1] - prefix) // grids
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _split_rows(_shift_indices(origin, grids, -tokens_per_part, first), grids, first)
    return _map_tokens(tokens, _split_rows, grids, origin, grids_after=1)


def _join_parts(tokens: Tokens, grids: int) -> Tokens:
    """Undo `_split_parts`; prefix tokens are those of the first part."""
    origin, tokens_per_part = tokens.origin, tokens.x.shape[1] - tokens.prefix
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _shift_indices(_join_rows(origin, grids, first), grids, tokens_per_part, first)
    return _map_tokens(tokens, _join_rows, grids, origin, grids_after=grids)


def _prefix_positions(tokens: Tokens) -> int:
    """Number of original positions that are prefix tokens. Prompts have no original position."""
    rows, columns = tokens.grid
    return 0 if tokens.origin is None else tokens.origin.shape[1] - tokens.grids * rows * columns


def _map_tokens(
    tokens: Tokens,
    change: Callable[[Tensor, int, int], Tensor],
    grids: int,
    origin: Tensor | None,
    *,
    grids_after: int,
) -> Tokens:
    """Apply `change` to everything in `tokens` that has a row per token."""

    def each(values: Tensor | None) -> Tensor | None:
        return None if values is None else change(values, grids, tokens.prefix)

    lost = tokens.lost
    return replace(
        tokens,
        x=change(tokens.x, grids, tokens.prefix),
        grids=grids_after,
        size=each(tokens.size),
        origin=origin,
        lost=None if lost is None else change(lost, grids, _prefix_positions(tokens)),
        carried={n: change(values, grids, tokens.prefix) for n, values in tokens.carried.items()},
        position=None if tokens.position is None else change(tokens.position, grids, 0),
        policy=each(tokens.policy),
        selected=each(tokens.selected),
    )


def _split_by_products(attended: ByProducts, tokens: Tokens) -> ByProducts:
    """Split the by-products that have a row per token; reduction methods read no others."""

    def each(values: Tensor | None) -> Tensor | None:
        return None if values is None else _split_rows(values, tokens.grids, tokens.prefix)

    return ByProducts(
        mean_keys=each(attended.mean_keys),
        class_attention=each(attended.class_attention),
        mean_attention=each(attended.mean_attention),
        shift=each(attended.shift),
        attention_input=each(attended.attention_input),
    )


def _join_groupings(grouping: Grouping, tokens: Tokens) -> Grouping:
    """Join the groupings of the parts to one grouping of each image or clip."""
    if type(grouping) is not Grouping:
        raise ValueError(
            "this method changes tokens as they merge, which it cannot do in parts: use it alone."
        )
    grids, prefix = tokens.grids, tokens.prefix
    old, new = grouping.num_tokens - prefix, grouping.keep.shape[1] - prefix

    def join(index: Tensor, step: int, first: int = 0) -> Tensor:
        return _shift_indices(_join_rows(index, grids, first), grids, step, first)

    weight, fused, share = grouping.weight, grouping.fused, grouping.absorbed_share
    return Grouping(
        keep=join(grouping.keep, old, prefix),
        src=join(grouping.src, old),
        dst=join(grouping.dst, new),
        num_tokens=prefix + grids * old,
        weight=None if weight is None else _join_rows(weight, grids, prefix),
        how=grouping.how,
        fused=None if fused is None else join(fused, new),
        absorbed_share=None if share is None else _join_rows(share, grids, 0),
    )


def _shift_indices(index_BK: Tensor, grids: int, step: int, first: int) -> Tensor:
    """Add `step` * t to the indices of part t. Prefix tokens and -1 stay as they are.

    Args:
        index_BK: Indices of all parts, those of `first` prefix tokens before them.
        grids: Number of parts.
        step: Distance between the indices of the same token in two successive parts.
        first: Number of leading indices that belong to prefix tokens.
    """
    number = torch.arange(grids, device=index_BK.device)
    moves = step * number.repeat_interleave((index_BK.shape[1] - first) // grids)
    moved = index_BK + F.pad(moves, (first, 0))
    return torch.where(index_BK < 0, index_BK, moved)


def _split_rows(values: Tensor, grids: int, first: int) -> Tensor:
    """Split rows by part; each part gets a copy of the `first` rows."""
    shared, patches = values.tensor_split([first], dim=1)
    num_images, num_patches = patches.shape[:2]
    parts = patches.reshape(num_images * grids, num_patches // grids, *values.shape[2:])
    return torch.cat([shared.repeat_interleave(grids, dim=0), parts], dim=1) if first else parts


def _join_rows(values: Tensor, grids: int, first: int) -> Tensor:
    """Undo `_split_rows`; the `first` rows are those of the first part."""
    shared, patches = values.tensor_split([first], dim=1)
    num_parts, num_patches = patches.shape[:2]
    whole = patches.reshape(num_parts // grids, num_patches * grids, *values.shape[2:])
    return torch.cat([shared[::grids], whole], dim=1) if first else whole
