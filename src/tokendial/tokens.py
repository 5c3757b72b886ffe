"""Tokens, which flow from block to block, and Grouping, one reduction as data."""

# Shape legend: B batch, N tokens (prefix + patch), G tokens after a reduction, S tokens that are
# absorbed by another one, P original positions (prefix + patch), D any feature width.

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokendial.kernels import fuses, merge_fused


@dataclass(slots=True)
class Grouping:
    """One reduction: which old token each new token comes from, and which old ones it absorbs.

    New token `g` starts from old token `keep[g]`; old token `src[s]` is absorbed by new token
    `dst[s]`. An old token named in neither is dropped. Holding the kept rows apart from the few
    absorbed ones lets `merge` be one gather and one small scatter.
    """

    keep: Tensor
    """[B, G] old index that each new token starts from."""
    src: Tensor
    """[B, S] old indices that are absorbed (S may be 0)."""
    dst: Tensor
    """[B, S] new index that absorbs each of them."""
    num_tokens: int
    """N, the number of old tokens."""
    weight: Tensor | None = None
    """[B, N] weight of each old token in its group; None: the token's size."""
    how: Literal["mean", "sum"] = "mean"
    """Whether a group is the weighted mean or the weighted sum of its members."""
    fused: Tensor | None = None
    """[B, F] new tokens that stand for what was given up, be it one old token or many; None: there
    are none."""

    @classmethod
    def keeping(cls, keep: Tensor, num_tokens: int) -> "Grouping":
        """The reduction that keeps the old tokens `keep` [B, G] and drops all others."""
        return cls(keep, keep[:, :0], keep[:, :0], num_tokens)

    @property
    def index(self) -> Tensor:
        """[B, N] new index of every old token, -1 where it was dropped."""
        num_images, num_groups = self.keep.shape
        groups = torch.arange(num_groups, device=self.keep.device).expand(num_images, -1)
        index = self.keep.new_full((num_images, self.num_tokens), -1)
        return index.scatter(1, self.keep, groups).scatter(1, self.src, self.dst)

    def merge(self, x_BND: Tensor, weight_BN: Tensor | None = None) -> Tensor:
        """Features of the new tokens.

        Args:
            x_BND: Features of the old tokens.
            weight_BN: Weights of the old tokens; None: `self.weight`, or all equal.

        Returns:
            [B, G, D], the weighted mean or sum (`self.how`) of each group.
        """
        weight_BN = self.weight if weight_BN is None else weight_BN
        if self.how == "sum" and weight_BN is None:
            return self.sum(x_BND)
        if self.how == "mean" and self.src.shape[1] == 0:
            return take(x_BND, self.keep)
        if fuses(x_BND):
            return merge_fused(x_BND, self.keep, self.src, self.dst, weight_BN, self.how)
        if weight_BN is None:
            weight_BN = x_BND.new_ones(x_BND.shape[:2])
        # Weights become shares before they meet the features, which are then passed over once.
        kept_BG, absorbed_BS = weight_BN.gather(1, self.keep), weight_BN.gather(1, self.src)
        if self.how == "mean":
            total_BG = self.sum(weight_BN.unsqueeze(-1)).squeeze(-1)
            kept_BG = kept_BG / total_BG
            absorbed_BS = absorbed_BS / total_BG.gather(1, self.dst)
        return self._absorbed(
            _times(take(x_BND, self.keep), kept_BG), _times(take(x_BND, self.src), absorbed_BS)
        )

    def sum(self, x_BND: Tensor) -> Tensor:
        """Plain sum of each group's members, [B, G, D]."""
        if fuses(x_BND):
            return merge_fused(x_BND, self.keep, self.src, self.dst, None, "sum")
        return self._absorbed(take(x_BND, self.keep), take(x_BND, self.src))

    def _absorbed(self, kept_BGD: Tensor, absorbed_BSD: Tensor) -> Tensor:
        """Kept tokens, which nobody else needs, with the absorbed ones added to them."""
        if self.src.shape[1] == 0:
            return kept_BGD
        if torch.compiler.is_exporting():
            # Other runtimes add up colliding indices slowly, wrongly, or not at all.
            groups = torch.arange(kept_BGD.shape[1], device=kept_BGD.device)
            membership_BGS = groups[:, None] == self.dst[:, None, :]
            return kept_BGD + membership_BGS.to(kept_BGD.dtype) @ absorbed_BSD
        into = _flat(self.dst, kept_BGD.shape[1])
        kept_BGD.flatten(0, 1).index_add_(0, into, absorbed_BSD.flatten(0, 1))
        return kept_BGD

    def unmerge(self, y_BGD: Tensor) -> Tensor:
        """Give every old token its group's features; dropped tokens get zeros. [B, N, D]."""
        index = self.index
        if self.keep.shape[1] + self.src.shape[1] == self.num_tokens:  # nothing was dropped
            return take(y_BGD, index)
        return take(y_BGD, index.clamp(min=0)) * (index >= 0).unsqueeze(-1)

    def follow(self, origin_BP: Tensor, *, fused_count: bool = True) -> Tensor:
        """Update the map from original positions to tokens. [B, P], -1 where dropped.

        Args:
            origin_BP: The map so far.
            fused_count: Whether members of a fused token are found in it, or count as dropped.
        """
        index = self.index
        if self.fused is not None and not fused_count:
            fused = torch.zeros_like(self.keep).scatter(1, self.fused, 1)
            in_fused = (index >= 0) & (fused.gather(1, index.clamp(min=0)) > 0)
            index = index.masked_fill(in_fused, -1)
        followed = index.gather(1, origin_BP.clamp(min=0))
        return torch.where(origin_BP < 0, origin_BP, followed)


@dataclass(slots=True)
class Tokens:
    """What passes from block to block."""

    x: Tensor
    """[B, N, D] features, prefix tokens (class, distillation, register) first."""
    prefix: int
    """Number of prefix tokens."""
    grid: tuple[int, int]
    """Rows and columns of patches in the image, or in a frame."""
    grids: int = 1
    """Grids that the sequence holds one after another: time steps of a clip."""
    size: Tensor | None = None
    """[B, N] float32 patches that each token stands for; None: one each."""
    origin: Tensor | None = None
    """[B, P] token that holds each original position, -1 where dropped; None: not tracked."""
    lost: Tensor | None = None
    """[B, P, D] features of the dropped positions when they were dropped; with `origin`."""
    fused_count: bool = True
    """Whether `origin` follows tokens into a fused one (see `Grouping.fused`); if not, they count
    as dropped."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """Features [B, N, *] that follow the tokens through each reduction."""
    rope: Tensor | None = None
    """Rotary table of the backbone over the original patches; None: it has none."""
    position: Tensor | None = None
    """[B, L] patch that each patch token stands at, with `rope`: that of the token which absorbs
    others; None: nothing was reduced yet."""
    policy: Tensor | None = None
    """[B, N] 1 for tokens that attention sees and 0 for dropped ones, in training with masks;
    None: it sees all."""
    selected: Tensor | None = None
    """[B, N] 1 for tokens that the last FFN processed and 0 for skipped ones; None: all."""

    def tracked(self, *, fused_count: bool = True) -> "Tokens":
        """The same tokens, with `origin` kept from here on.

        Args:
            fused_count: Whether positions follow their tokens into a fused one.
        """
        num_images, num_tokens = self.x.shape[:2]
        origin = torch.arange(num_tokens, device=self.x.device).expand(num_images, -1)
        lost = torch.zeros_like(self.x)
        return dataclasses.replace(self, origin=origin, lost=lost, fused_count=fused_count)

    def reduced(self, grouping: Grouping, *, track_size: bool = False) -> "Tokens":
        """The tokens after `grouping`: features, sizes, positions and carried features alike.

        Args:
            grouping: The reduction.
            track_size: Keep counting sizes from here on, if nothing counted them before.
        """
        size = self.size
        if size is None and track_size:
            size = torch.ones(self.x.shape[:2], device=self.x.device)
        weight = size if grouping.weight is None else grouping.weight
        origin, lost = self.origin, self.lost
        if origin is not None and lost is not None:
            followed = grouping.follow(origin, fused_count=self.fused_count)
            dropped_now = ((followed < 0) & (origin >= 0)).unsqueeze(-1)
            lost = torch.where(dropped_now, take(self.x, origin.clamp(min=0)), lost)
            origin = followed
        position = self.position
        if self.rope is not None:
            patches = grouping.keep[:, self.prefix :] - self.prefix
            position = patches if position is None else position.gather(1, patches)
        return dataclasses.replace(
            self,
            x=grouping.merge(self.x, weight),
            size=None if size is None else grouping.sum(size.unsqueeze(-1)).squeeze(-1),
            origin=origin,
            lost=lost,
            carried={name: grouping.merge(y, weight) for name, y in self.carried.items()},
            position=position,
        )

    def prefix_alone(self) -> "Tokens":
        """The prefix tokens, without any patch."""
        prefix = torch.arange(self.prefix, device=self.x.device).expand(self.x.shape[0], -1)
        return self.reduced(Grouping.keeping(prefix, self.x.shape[1]))

    def with_prompts(self, prompts_PD: Tensor) -> "Tokens":
        """The same tokens with prompts, the same for each image, as the last prefix tokens."""
        at, count = self.prefix, len(prompts_PD)

        def insert(values: Tensor, new: Tensor | float) -> Tensor:
            between = values.new_zeros(values.shape[0], count, *values.shape[2:]) + new
            return torch.cat([values[:, :at], between, values[:, at:]], dim=1)

        return dataclasses.replace(
            self,
            x=insert(self.x, prompts_PD.to(self.x.dtype)),
            prefix=at + count,
            size=None if self.size is None else insert(self.size, 1.0),
            policy=None if self.policy is None else insert(self.policy, 1.0),
            selected=None if self.selected is None else insert(self.selected, 1.0),
            origin=_moved(self.origin, at, count),
            carried={name: insert(y, 0.0) for name, y in self.carried.items()},
        )

    def without_prompts(self, count: int) -> "Tokens":
        """The same tokens without the last `count` prefix tokens."""
        at = self.prefix - count

        def remove(values: Tensor) -> Tensor:
            return torch.cat([values[:, :at], values[:, self.prefix :]], dim=1)

        return dataclasses.replace(
            self,
            x=remove(self.x),
            prefix=at,
            size=None if self.size is None else remove(self.size),
            policy=None if self.policy is None else remove(self.policy),
            selected=None if self.selected is None else remove(self.selected),
            origin=_moved(self.origin, self.prefix, -count),
            carried={name: remove(y) for name, y in self.carried.items()},
        )

    def restored(self) -> Tensor:
        """Features at every original position, [B, P, D]: all reductions undone.

        A merged token is copied back to each of its positions; a dropped position has the
        features that it had when it was dropped. See `tracked` for those that were fused.

        Raises:
            ValueError: If positions were not tracked.
        """
        if self.origin is None or self.lost is None:
            raise ValueError("origin is not tracked: start from Tokens.tracked().")
        held = take(self.x, self.origin.clamp(min=0))
        return torch.where((self.origin < 0).unsqueeze(-1), self.lost, held)


def take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image's tokens, in the order of `index_BK`. [B, K, D]."""
    # Whole rows at once; a gather would look up each feature by itself, seven times slower.
    rows = x_BND.flatten(0, 1).index_select(0, _flat(index_BK, x_BND.shape[1]))
    return rows.view(*index_BK.shape, x_BND.shape[2])


def _times(rows_BKD: Tensor, share_BK: Tensor) -> Tensor:
    """Rows, which nobody else needs, times their shares."""
    shares = share_BK.to(rows_BKD.dtype).unsqueeze(-1)
    # Gradients of the shares need the rows as they were.
    return rows_BKD * shares if torch.is_grad_enabled() else rows_BKD.mul_(shares)


def _moved(origin_BP: Tensor | None, first: int, by: int) -> Tensor | None:
    """The map to tokens after those from `first` on have moved by some places."""
    return None if origin_BP is None else origin_BP + by * (origin_BP >= first)


def _flat(index_BK: Tensor, num_tokens: int) -> Tensor:
    """The same indices into the tokens of all images laid end to end. [B * K]."""
    first = num_tokens * torch.arange(index_BK.shape[0], device=index_BK.device)
    return (index_BK + first.unsqueeze(1)).flatten()


def patch_grid(tokens: Tokens) -> Tensor:
    """Patch tokens of a complete sequence as maps, [B * grids, D, rows, columns]."""
    return to_grid(tokens.x[:, tokens.prefix :], tokens.grid)


def to_grid(patches_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches as maps [M, D, rows, columns]; M is B, or more if a sequence holds several grids."""
    rows, columns = grid
    width = patches_BLD.shape[-1]
    maps = patches_BLD.reshape(-1, rows * columns, width)
    return maps.transpose(1, 2).reshape(maps.shape[0], width, *grid)


def from_grid(maps_MDRC: Tensor, num_patches: int) -> Tensor:
    """The opposite of `to_grid`: [B, L, D] of sequences with `num_patches` patches."""
    width = maps_MDRC.shape[1]
    return maps_MDRC.flatten(2).transpose(1, 2).reshape(-1, num_patches, width)
