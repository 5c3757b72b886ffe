"""Reducing the tokens of each time step of a clip by themselves, where attention sees them all.

A video model that embeds tubelets (VideoMAE) has the tokens of a whole clip in one sequence. A
reduction method then compares all of them: ToMe merges over time, EViT may drop a whole time step.
Wrapped by this one, it sees one time step at a time, and every time step loses as many tokens.
"""

# Shape legend: B clips, G time steps, N tokens of a clip, D embed_dim.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokendial.attention import Attended
from tokendial.methods import from_json, register
from tokendial.reduce.base import Passes, Reducer, ReducerConfig, ViTShape
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
        if vit.num_grids > 1 and vit.num_prefix_tokens:
            raise ValueError("frame_by_frame needs clips without class or register tokens.")
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

    def group(self, layer: int, degree: int, tokens: Tokens, attended: Attended) -> Grouping | None:
        """The groupings of all time steps as one."""
        seen = _attended_apart(attended, tokens.grids)
        grouping = self.inner.group(layer, degree, _apart(tokens), seen)
        return None if grouping is None else _one_grouping(grouping, tokens.grids)

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: Attended,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """As the method does with each time step."""
        grids = tokens.grids
        seen = _attended_apart(attended, grids)
        x, selected = self.inner.around_ffn(layer, degree, _apart(tokens), seen, ffn)
        return _join(x, grids), None if selected is None else _join(selected, grids)

    def losses(self, passes: Passes) -> dict[str, Tensor]:
        """The method's; shares are taken over whole clips."""
        return self.inner.losses(passes)

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Tell the method."""
        self.inner.at_step(step, steps_per_epoch)


def _apart(tokens: Tokens) -> Tokens:
    """[B, N, ...] to [B * G, N / G, ...], one grid each."""
    grids, held = tokens.grids, tokens.x.shape[1] // tokens.grids
    origin = tokens.origin
    if origin is not None:
        origin = _split(_numbered(origin, grids, -held), grids)
    return _changed(tokens, lambda values: _split(values, grids), grids=1, origin=origin)


def _together(tokens: Tokens, grids: int) -> Tokens:
    """The opposite of `_apart`."""
    origin = tokens.origin
    if origin is not None:
        origin = _numbered(_join(origin, grids), grids, tokens.x.shape[1])
    return _changed(tokens, lambda values: _join(values, grids), grids=grids, origin=origin)


def _changed(
    tokens: Tokens, change: Callable[[Tensor], Tensor], *, grids: int, origin: Tensor | None
) -> Tokens:
    def each(values: Tensor | None) -> Tensor | None:
        return None if values is None else change(values)

    return replace(
        tokens,
        x=change(tokens.x),
        grids=grids,
        size=each(tokens.size),
        origin=origin,
        lost=each(tokens.lost),
        carried={name: change(values) for name, values in tokens.carried.items()},
        policy=each(tokens.policy),
        selected=each(tokens.selected),
    )


def _attended_apart(attended: Attended, grids: int) -> Attended:
    """By-products that have a row for each token; reduction methods read no others."""

    def each(values: Tensor | None) -> Tensor | None:
        return None if values is None else _split(values, grids)

    return Attended(
        mean_keys=each(attended.mean_keys),
        class_attention=each(attended.class_attention),
        mean_attention=each(attended.mean_attention),
    )


def _one_grouping(grouping: Grouping, grids: int) -> Grouping:
    """The grouping of clips from those of their time steps."""

    def joined(index: Tensor, tokens: int) -> Tensor:
        return _numbered(_join(index, grids), grids, tokens)

    weight = grouping.weight
    return Grouping(
        keep=joined(grouping.keep, grouping.num_tokens),
        src=joined(grouping.src, grouping.num_tokens),
        dst=joined(grouping.dst, grouping.keep.shape[1]),
        num_tokens=grids * grouping.num_tokens,
        weight=None if weight is None else _join(weight, grids),
        how=grouping.how,
    )


def _numbered(index_BK: Tensor, grids: int, step: int) -> Tensor:
    """Indices of clips moved by `step` from one time step to the next; -1 stays."""
    first = step * torch.arange(grids, device=index_BK.device)
    moved = index_BK + first.repeat_interleave(index_BK.shape[1] // grids)
    return torch.where(index_BK < 0, index_BK, moved)


def _split(values: Tensor, grids: int) -> Tensor:
    return values.reshape(values.shape[0] * grids, values.shape[1] // grids, *values.shape[2:])


def _join(values: Tensor, grids: int) -> Tensor:
    return values.reshape(values.shape[0] // grids, values.shape[1] * grids, *values.shape[2:])
