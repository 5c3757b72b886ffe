"""Frame-by-frame reduction: a method reduces the tokens of each time step of a clip separately.

A video model that embeds tubelets (VideoMAE) has the tokens of a whole clip in one sequence. A
reduction method then compares all of them: ToMe merges across time, EViT may drop a whole time
step. Inside `FrameByFrame` the method receives one time step at a time, so that every time step
loses the same number of tokens. Attention still reads the whole clip.

Source: none; it is a variant of this library.
"""

# Shape legend: B clips, G time steps, N tokens of a clip, P prefix tokens, D embed_dim.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.methods import from_json, register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@register("reduce", "frame_by_frame")
@dataclass(frozen=True, kw_only=True)
class FrameByFrame(ReducerConfig):
    """Run another reduction method on each time step of a clip separately."""

    reduce: Any
    """The method to run, such as `ToMe(r=8)`, or its plain-JSON form. Its numbers of tokens count
    for one time step."""

    def __post_init__(self) -> None:
        if isinstance(self.reduce, dict):
            object.__setattr__(self, "reduce", from_json("reduce", self.reduce))
        if not isinstance(self.reduce, ReducerConfig) or isinstance(self.reduce, FrameByFrame):
            raise ValueError(f"reduce must be another reduction method, got {self.reduce!r}.")
        if getattr(self.reduce, "selection", None) == "threshold":
            raise ValueError(
                f"reduce: {type(self.reduce).__name__} by threshold decides on each token "
                "separately, so frame_by_frame would change nothing: leave frame_by_frame out."
            )

    def build(self, vit: ViTShape) -> "FrameByFrameReducer":
        """Make the module. Raises a ValueError if the method does not fit one time step."""
        return FrameByFrameReducer(self, vit)


class FrameByFrameReducer(Reducer):
    """Runs the inner method on each time step. The dial is that of the inner method."""

    def __init__(self, config: FrameByFrame, vit: ViTShape) -> None:
        super().__init__()
        step = replace(vit, num_patches=vit.num_patches // vit.num_grids, num_grids=1)
        self.inner: Reducer = config.reduce.build(step)
        self.needs, self.extra_passes = self.inner.needs, self.inner.extra_passes
        self.tracks_size = self.inner.tracks_size
        self.keeps_grid = self.inner.keeps_grid
        self.protects = False
        self.proportional_attention = self.inner.proportional_attention
        self.degrees, self.degree = self.inner.degrees, self.inner.degree

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the inner method reduces in `layer`."""
        return self.inner.reduces_in(layer, degree)

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Let the inner method prepare the tokens of each time step."""
        return _join_time_steps(
            self.inner.before_block(layer, degree, _split_time_steps(tokens)), tokens.grids
        )

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Let the inner method group each time step, and join the groupings."""
        seen = _split_by_products(attended, tokens)
        grouping = self.inner.group(layer, degree, _split_time_steps(tokens), seen)
        return None if grouping is None else _join_groupings(grouping, tokens)

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None] | None:
        """Let the inner method run the FFN on each time step."""
        seen = _split_by_products(attended, tokens)
        result = self.inner.around_ffn(layer, degree, _split_time_steps(tokens), seen, ffn)
        if result is None:
            return None
        x, selected = result
        if selected is not None:
            selected = _join_rows(selected, tokens.grids, tokens.prefix)
        return _join_rows(x, tokens.grids, tokens.prefix), selected

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the inner method's losses; their fractions of tokens are those of whole clips."""
        return self.inner.losses(passes)

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Pass the step on to the inner method."""
        self.inner.at_step(step, steps_per_epoch)


def _split_time_steps(tokens: Tokens) -> Tokens:
    """Make each time step a sequence: [B, N, ...] to [B * G, P + (N - P) / G, ...].

    Prefix tokens belong to the whole clip, so each time step gets a copy of them.
    """
    grids, prefix, origin = tokens.grids, tokens.prefix, tokens.origin
    tokens_per_step = (tokens.x.shape[1] - prefix) // grids
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _split_rows(_shift_indices(origin, grids, -tokens_per_step, first), grids, first)
    return _map_tokens(tokens, _split_rows, grids, origin, grids_after=1)


def _join_time_steps(tokens: Tokens, grids: int) -> Tokens:
    """Undo `_split_time_steps`; prefix tokens are those of the first time step."""
    origin, tokens_per_step = tokens.origin, tokens.x.shape[1] - tokens.prefix
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _shift_indices(_join_rows(origin, grids, first), grids, tokens_per_step, first)
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
    )


def _join_groupings(grouping: Grouping, tokens: Tokens) -> Grouping:
    """Join the groupings of the time steps to one grouping of each clip."""
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
    """Add `step` * t to the indices of time step t. Prefix tokens and -1 stay as they are.

    Args:
        index_BK: Indices of all time steps, those of `first` prefix tokens before them.
        grids: Number of time steps.
        step: Distance between the indices of the same token in two successive time steps.
        first: Number of leading indices that belong to prefix tokens.
    """
    number = torch.arange(grids, device=index_BK.device)
    moves = step * number.repeat_interleave((index_BK.shape[1] - first) // grids)
    moved = index_BK + F.pad(moves, (first, 0))
    return torch.where(index_BK < 0, index_BK, moved)


def _split_rows(values: Tensor, grids: int, first: int) -> Tensor:
    """Split the rows of clips by time step; each time step gets a copy of the `first` rows."""
    shared, patches = values.tensor_split([first], dim=1)
    num_clips, num_patches = patches.shape[:2]
    steps = patches.reshape(num_clips * grids, num_patches // grids, *values.shape[2:])
    return torch.cat([shared.repeat_interleave(grids, dim=0), steps], dim=1) if first else steps


def _join_rows(values: Tensor, grids: int, first: int) -> Tensor:
    """Undo `_split_rows`; the `first` rows are those of the first time step."""
    shared, patches = values.tensor_split([first], dim=1)
    num_steps, num_patches = patches.shape[:2]
    clips = patches.reshape(num_steps // grids, num_patches * grids, *values.shape[2:])
    return torch.cat([shared[::grids], clips], dim=1) if first else clips
