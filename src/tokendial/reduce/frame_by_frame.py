"""Reducing the tokens of each time step of a clip by themselves, where attention sees them all.

A video model that embeds tubelets (VideoMAE) has the tokens of a whole clip in one sequence. A
reduction method then compares all of them: ToMe merges over time, EViT may drop a whole time step.
Wrapped by this one, it sees one time step at a time, and every time step loses as many tokens.
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
    """Run another reduction method on each time step of a clip."""

    reduce: Any
    """The method, such as `ToMe(r=8)`, whose numbers are then those of a time step; or its
    plain-JSON form."""

    def __post_init__(self) -> None:
        if isinstance(self.reduce, dict):
            object.__setattr__(self, "reduce", from_json("reduce", self.reduce))
        if not isinstance(self.reduce, ReducerConfig) or isinstance(self.reduce, FrameByFrame):
            raise ValueError(f"reduce must be another reduction method, got {self.reduce!r}.")
        if getattr(self.reduce, "selection", None) == "threshold":
            raise ValueError(
                f"reduce: {type(self.reduce).__name__} by threshold looks at each token by itself, "
                "so there is nothing to be done frame by frame: leave frame_by_frame out."
            )

    def build(self, vit: ViTShape) -> "FrameByFrameReducer":
        """Make the module; a ValueError if the method does not fit the tokens of a time step."""
        return FrameByFrameReducer(self, vit)


class FrameByFrameReducer(Reducer):
    """Runs a method on time steps; the dial is the method's."""

    def __init__(self, config: FrameByFrame, vit: ViTShape) -> None:
        super().__init__()
        step = replace(vit, num_patches=vit.num_patches // vit.num_grids, num_grids=1)
        self.inner: Reducer = config.reduce.build(step)
        self.needs, self.also_runs = self.inner.needs, self.inner.also_runs
        self.tracks_size = self.inner.tracks_size
        self.keeps_grid = self.inner.keeps_grid
        self.proportional_attention = self.inner.proportional_attention
        self.degrees, self.degree = self.inner.degrees, self.inner.degree

    def acts(self, layer: int, degree: int) -> bool:
        """Where the method does."""
        return self.inner.acts(layer, degree)

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """As the method does with each time step."""
        return _together(self.inner.before_block(layer, degree, _apart(tokens)), tokens.grids)

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """The groupings of all time steps as one."""
        seen = _attended_apart(attended, tokens)
        grouping = self.inner.group(layer, degree, _apart(tokens), seen)
        return None if grouping is None else _one_grouping(grouping, tokens)

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None] | None:
        """As the method does with each time step."""
        seen = _attended_apart(attended, tokens)
        ran = self.inner.around_ffn(layer, degree, _apart(tokens), seen, ffn)
        if ran is None:
            return None
        x, selected = ran
        if selected is not None:
            selected = _join(selected, tokens.grids, tokens.prefix)
        return _join(x, tokens.grids, tokens.prefix), selected

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """The method's; shares are taken over whole clips."""
        return self.inner.losses(passes)

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Tell the method."""
        self.inner.at_step(step, steps_per_epoch)


def _apart(tokens: Tokens) -> Tokens:
    """Each time step of each clip as a sequence [B * G, P + (N - P) / G, ...] of one grid.

    Prefix tokens, which belong to the whole clip, stand before each of them.
    """
    grids, prefix, origin = tokens.grids, tokens.prefix, tokens.origin
    held = (tokens.x.shape[1] - prefix) // grids
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _split(_numbered(origin, grids, -held, first), grids, first)
    return _changed(tokens, _split, grids, origin, grids_after=1)


def _together(tokens: Tokens, grids: int) -> Tokens:
    """The opposite of `_apart`."""
    origin, held = tokens.origin, tokens.x.shape[1] - tokens.prefix
    first = _prefix_positions(tokens)
    if origin is not None:
        origin = _numbered(_join(origin, grids, first), grids, held, first)
    return _changed(tokens, _join, grids, origin, grids_after=grids)


def _prefix_positions(tokens: Tokens) -> int:
    """Original positions that are prefix tokens; prompts have none."""
    rows, columns = tokens.grid
    return 0 if tokens.origin is None else tokens.origin.shape[1] - tokens.grids * rows * columns


def _changed(
    tokens: Tokens,
    change: Callable[[Tensor, int, int], Tensor],
    grids: int,
    origin: Tensor | None,
    *,
    grids_after: int,
) -> Tokens:
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


def _attended_apart(attended: ByProducts, tokens: Tokens) -> ByProducts:
    """By-products that have a row for each token; reduction methods read no others."""

    def each(values: Tensor | None) -> Tensor | None:
        return None if values is None else _split(values, tokens.grids, tokens.prefix)

    return ByProducts(
        mean_keys=each(attended.mean_keys),
        class_attention=each(attended.class_attention),
        mean_attention=each(attended.mean_attention),
    )


def _one_grouping(grouping: Grouping, tokens: Tokens) -> Grouping:
    """The grouping of clips from those of their time steps."""
    grids, prefix = tokens.grids, tokens.prefix
    old, new = grouping.num_tokens - prefix, grouping.keep.shape[1] - prefix

    def joined(index: Tensor, step: int, first: int = 0) -> Tensor:
        return _numbered(_join(index, grids, first), grids, step, first)

    weight, fused = grouping.weight, grouping.fused
    return Grouping(
        keep=joined(grouping.keep, old, prefix),
        src=joined(grouping.src, old),
        dst=joined(grouping.dst, new),
        num_tokens=prefix + grids * old,
        weight=None if weight is None else _join(weight, grids, prefix),
        how=grouping.how,
        fused=None if fused is None else joined(fused, new),
    )


def _numbered(index_BK: Tensor, grids: int, step: int, first: int) -> Tensor:
    """Indices of clips moved by `step` from one time step to the next; -1 stays.

    The `first` ones are of prefix tokens and stay, too.
    """
    number = torch.arange(grids, device=index_BK.device)
    moves = step * number.repeat_interleave((index_BK.shape[1] - first) // grids)
    moved = index_BK + F.pad(moves, (first, 0))
    return torch.where(index_BK < 0, index_BK, moved)


def _split(values: Tensor, grids: int, first: int) -> Tensor:
    """Of clips to of time steps, the `first` rows repeated for each of them."""
    shared, apart = values.tensor_split([first], dim=1)
    num_clips, held = apart.shape[:2]
    steps = apart.reshape(num_clips * grids, held // grids, *values.shape[2:])
    return torch.cat([shared.repeat_interleave(grids, dim=0), steps], dim=1) if first else steps


def _join(values: Tensor, grids: int, first: int) -> Tensor:
    """The opposite of `_split`."""
    shared, apart = values.tensor_split([first], dim=1)
    num_steps, held = apart.shape[:2]
    clips = apart.reshape(num_steps // grids, held * grids, *values.shape[2:])
    return torch.cat([shared[::grids], clips], dim=1) if first else clips
