"""Tokens, which flow from block to block, and Grouping, which describes one reduction as data."""

# Shape legend: B batch, N tokens (prefix + patch), G tokens after a reduction, S tokens that are
# absorbed by another one, L patch tokens, P original positions (prefix + patch), D feature width.

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokendial.kernels import merge_fused, should_fuse


@dataclass(slots=True)
class Grouping:
    """One reduction: which old token each new token starts from, and which old tokens it absorbs.

    New token `g` starts from old token `keep[g]`; old token `src[s]` is absorbed by new token
    `dst[s]`. An old token named in neither is dropped. Most tokens are kept and few are absorbed,
    so `merge` is one gather of the kept rows and one small scatter of the absorbed ones.
    """

    keep: Tensor
    """[B, G] the old token that each new token starts from."""
    src: Tensor
    """[B, S] the old tokens that are absorbed (S may be 0)."""
    dst: Tensor
    """[B, S] the new token that absorbs each of `src`."""
    num_tokens: int
    """N, the number of old tokens."""
    weight: Tensor | None = None
    """[B, N] weight of each old token in its group; None: the token's size."""
    how: Literal["mean", "sum"] = "mean"
    """Whether a new token is the weighted mean or the weighted sum of its group."""
    fused: Tensor | None = None
    """[B, F] new tokens that summarise removed tokens, as EViT's fused token does; None: there are
    none. `follow` can treat the members of a fused token as dropped."""

    absorbed_share: Tensor | None = None
    """[B, S] what the sizes of `src` are multiplied by before they are added; None: 1."""

    @classmethod
    def keep_only(cls, keep: Tensor, num_tokens: int) -> "Grouping":
        """A reduction that keeps the old tokens `keep` [B, G] and drops all others."""
        return cls(keep, keep[:, :0], keep[:, :0], num_tokens)

    @property
    def index(self) -> Tensor:
        """[B, N] the new token that holds every old token, -1 where it was dropped."""
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
        return self.merge_each([x_BND], weight_BN)[0][0]

    def merge_each(
        self, features: Sequence[Tensor], weight_BN: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Apply `merge` to several features [B, N, *] of the same tokens.

        Returns:
            The merged features, and the sum of the weights in each group, [B, G], where it was
            computed on the way.
        """
        weight_BN = self.weight if weight_BN is None else weight_BN
        if self.how == "sum" and weight_BN is None:
            return [self.sum(x) for x in features], None
        if self.how == "mean" and self.src.shape[1] == 0:
            return [take(x, self.keep) for x in features], None
        if should_fuse(features[0]):
            return [
                merge_fused(x, self.keep, self.src, self.dst, weight_BN, self.how) for x in features
            ], None
        if weight_BN is None:
            weight_BN = features[0].new_ones(features[0].shape[:2])
        rows = _Rows.of(self)
        # Weights become shares of the group before they meet the features: then the features,
        # which are much larger, are passed over only once.
        kept_BG, absorbed_BS = weight_BN.gather(1, self.keep), weight_BN.gather(1, self.src)
        total_BG = None
        if self.how == "mean":
            kept_BG1, absorbed_BS1 = kept_BG.clone().unsqueeze(-1), absorbed_BS.unsqueeze(-1)
            total_BG = rows.add_absorbed(kept_BG1, absorbed_BS1).squeeze(-1)
            kept_BG = kept_BG / total_BG
            absorbed_BS = absorbed_BS / total_BG.gather(1, self.dst)
        merged = []
        for x in features:
            merged.append(rows.merge(x, kept_BG, absorbed_BS))
        return merged, total_BG

    def sum(self, x_BND: Tensor) -> Tensor:
        """Plain sum of each group's members, [B, G, D]."""
        if should_fuse(x_BND):
            return merge_fused(x_BND, self.keep, self.src, self.dst, None, "sum")
        return _Rows.of(self).merge(x_BND)

    def sizes(self, size_BN: Tensor) -> Tensor:
        """Sizes of the new tokens, [B, G], from those of the old ones."""
        if self.absorbed_share is not None:
            share_BN = torch.ones_like(size_BN).scatter(1, self.src, self.absorbed_share)
            size_BN = size_BN * share_BN
        return self.sum(size_BN.unsqueeze(-1)).squeeze(-1)

    def unmerge(self, y_BGD: Tensor) -> Tensor:
        """Give every old token its group's features; dropped tokens get zeros. [B, N, D]."""
        index = self.index
        if self.keep.shape[1] + self.src.shape[1] == self.num_tokens:  # nothing was dropped
            return take(y_BGD, index)
        return take(y_BGD, index.clamp(min=0)) * (index >= 0).unsqueeze(-1)

    def drops(self, follow_fused: bool = True) -> bool:
        """Whether `follow` would count old tokens as dropped; this does not look at values."""
        gives_up = self.keep.shape[1] + self.src.shape[1] < self.num_tokens
        return gives_up or (self.fused is not None and not follow_fused)

    def follow(self, origin_BP: Tensor, *, follow_fused: bool = True) -> Tensor:
        """Update the map from original positions to tokens. [B, P], -1 where dropped.

        Args:
            origin_BP: The token that held each original position before this reduction.
            follow_fused: If True, the members of a fused token are found in it. If False, they are
                counted as dropped.
        """
        index = self.index
        if self.fused is not None and not follow_fused:
            fused = torch.zeros_like(self.keep).scatter(1, self.fused, 1)
            in_fused = (index >= 0) & (fused.gather(1, index.clamp(min=0)) > 0)
            index = index.masked_fill(in_fused, -1)
        followed = index.gather(1, origin_BP.clamp(min=0))
        return torch.where(origin_BP < 0, origin_BP, followed)


@dataclass(slots=True)
class _Rows:
    """A grouping's indices into the rows of all images laid end to end."""

    kept: Tensor
    """[B * G] rows of the old tokens that new tokens start from."""
    absorbed: Tensor
    """[B * S] rows of the old tokens that are absorbed."""
    into: Tensor
    """[B * S] rows of the new tokens that absorb them."""
    dst: Tensor
    """[B, S] the same, counted within each image."""
    num_groups: int
    """G, the number of new tokens of an image."""

    @classmethod
    def of(cls, grouping: Grouping) -> "_Rows":
        num_tokens, num_groups = grouping.num_tokens, grouping.keep.shape[1]
        return cls(
            _flat_indices(grouping.keep, num_tokens),
            _flat_indices(grouping.src, num_tokens),
            _flat_indices(grouping.dst, num_groups),
            grouping.dst,
            num_groups,
        )

    def merge(
        self,
        x_BND: Tensor,
        kept_share_BG: Tensor | None = None,
        absorbed_share_BS: Tensor | None = None,
    ) -> Tensor:
        """Kept rows plus the absorbed ones, each times its share (None: 1). [B, G, D]."""
        num_images, _, width = x_BND.shape
        rows = x_BND.flatten(0, 1)
        kept, absorbed = rows.index_select(0, self.kept), rows.index_select(0, self.absorbed)
        if kept_share_BG is not None:
            # Gradients of the shares need the rows as they were.
            times = torch.mul if torch.is_grad_enabled() else Tensor.mul_
            kept = times(kept, kept_share_BG.to(kept.dtype).view(-1, 1))
            if absorbed_share_BS is not None and not torch.compiler.is_exporting():
                absorbed = times(absorbed, absorbed_share_BS.to(kept.dtype).view(-1, 1))
        return self.add_absorbed(
            kept.view(num_images, self.num_groups, width),
            absorbed.view(num_images, self.dst.shape[1], width),
            absorbed_share_BS,
        )

    def add_absorbed(
        self, kept_BGD: Tensor, absorbed_BSD: Tensor, share_BS: Tensor | None = None
    ) -> Tensor:
        """Add absorbed rows to the kept ones that absorb them, [B, G, D]. Overwrites `kept_BGD`.

        Args:
            kept_BGD: Rows of the kept tokens.
            absorbed_BSD: Rows of the absorbed tokens.
            share_BS: What the absorbed rows are multiplied by first, in an exported file only.
        """
        if absorbed_BSD.shape[1] == 0:
            return kept_BGD
        if torch.compiler.is_exporting():
            # Other runtimes add at repeated indices slowly, wrongly, or not at all. A selection
            # keeps the dtype of the features, where some of them compute a cast in float32.
            groups = torch.arange(self.num_groups, device=kept_BGD.device)
            is_member_BGS = groups[:, None] == self.dst[:, None, :]
            share = kept_BGD.new_ones(()) if share_BS is None else share_BS[:, None].to(kept_BGD)
            return kept_BGD + torch.where(is_member_BGS, share, 0.0) @ absorbed_BSD
        kept_BGD.flatten(0, 1).index_add_(0, self.into, absorbed_BSD.flatten(0, 1))
        return kept_BGD


@dataclass(slots=True)
class Tokens:
    """The tokens of a batch with their sizes, positions and masks: all that one block passes on."""

    x: Tensor
    """[B, N, D] features, prefix tokens (class, distillation, register) first."""
    prefix: int
    """Number of prefix tokens."""
    grid: tuple[int, int]
    """Rows and columns of patches in the image, or in one frame of a clip."""
    grids: int = 1
    """Number of patch grids that the sequence holds one after another: the time steps of a clip, 1
    for an image."""
    size: Tensor | None = None
    """[B, N] float32 number of patches that each token stands for; None: one each."""
    origin: Tensor | None = None
    """[B, P] the token that holds each original position, -1 where it was dropped; None: positions
    are not tracked."""
    lost: Tensor | None = None
    """[B, P, D] features that dropped positions had when they were dropped; None: no position was
    dropped so far, or positions are not tracked."""
    follow_fused: bool = True
    """Whether `origin` follows tokens into a fused token (see `Grouping.fused`). If False, they
    count as dropped."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """Named features [B, N, *] that follow the tokens through each reduction."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """Named features [B, *, D] of the whole image, for later blocks. They belong to no token, so
    reductions leave them as they are."""
    rope: Tensor | None = None
    """Table of positions that the backbone reads in its blocks: the rotary table over the original
    patches, or what YOLOS adds between blocks. None: the backbone reads none."""
    position: Tensor | None = None
    """[B, L] the patch whose row of `rope` each patch token has. A token that absorbs others keeps
    its own. None: no reduction yet, or no table."""
    policy: Tensor | None = None
    """[B, N] 1 for tokens that attention sees, 0 for dropped ones, in training with masks; None:
    attention sees all."""
    selected: Tensor | None = None
    """[B, N] 1 for tokens that the last FFN processed, 0 for skipped ones; None: it processed all.
    """
    num_protected: int = 0
    """Number of patch tokens that no reduction may touch: the leading ones, unless `protected` says
    which."""
    protected: Tensor | None = None
    """[B, L] True for protected patches that stay in their places; None: they stand in front."""

    def with_protected(self, mask_BL: Tensor, *, in_place: bool) -> "Tokens":
        """The same tokens, with patches that no reduction may touch.

        Args:
            mask_BL: True for patches that are to be protected.
            in_place: Whether all patches stay where they are, in their grid. If not, protected ones
                go before the others. As many are protected in every image then as in the one with
                the most; the others get some of their first patches as well.

        Raises:
            ValueError: If the mask has another shape.
        """
        wanted = (self.x.shape[0], self.x.shape[1] - self.prefix)
        if mask_BL.shape != wanted:
            raise ValueError(
                f"mask must have {wanted[1]} patches for each of {wanted[0]} images, got "
                f"{list(mask_BL.shape)}."
            )
        most = int(mask_BL.sum(dim=1).max())
        mask_BL = mask_BL.to(self.x.device)
        if in_place:
            return dataclasses.replace(self, protected=mask_BL, num_protected=most)
        order_BL = mask_BL.int().argsort(dim=1, descending=True, stable=True)
        return dataclasses.replace(self.reordered(order_BL), num_protected=most)

    def reordered(self, order_BL: Tensor) -> "Tokens":
        """The same tokens, patches in another order; for tokens that enter the first block.

        Args:
            order_BL: The patch that comes to each place.
        """
        prefix = torch.arange(self.prefix, device=order_BL.device).expand(order_BL.shape[0], -1)
        order_BN = torch.cat([prefix, self.prefix + order_BL], dim=1)
        origin = None if self.origin is None else order_BN.argsort(dim=1).gather(1, self.origin)
        return dataclasses.replace(
            self,
            x=take(self.x, order_BN),
            size=None if self.size is None else self.size.gather(1, order_BN),
            origin=origin,
            position=None if self.rope is None else order_BL,
        )

    def guarded(self) -> "Tokens":
        """These tokens as reductions see them: protected patches in front are prefix tokens."""
        if self.protected is not None:
            return self
        return dataclasses.replace(self, prefix=self.prefix + self.num_protected)

    def with_tracking(self, *, follow_fused: bool = True) -> "Tokens":
        """The same tokens, with `origin` and `lost` kept up to date from here on.

        Args:
            follow_fused: See the field of that name.
        """
        num_images, num_tokens = self.x.shape[:2]
        origin = torch.arange(num_tokens, device=self.x.device).expand(num_images, -1)
        return dataclasses.replace(self, origin=origin, lost=None, follow_fused=follow_fused)

    def apply_grouping(self, grouping: Grouping, *, track_size: bool = False) -> "Tokens":
        """The tokens after a reduction: features, sizes, positions and carried features.

        Args:
            grouping: The reduction.
            track_size: Count sizes from here on, if they were not counted before.
        """
        size = self.size
        if size is None and track_size:
            size = torch.ones(self.x.shape[:2], device=self.x.device)
        weight = size if grouping.weight is None else grouping.weight
        origin, lost = self.origin, self.lost
        if origin is not None and (lost is not None or grouping.drops(self.follow_fused)):
            followed = grouping.follow(origin, follow_fused=self.follow_fused)
            dropped_now = ((followed < 0) & (origin >= 0)).unsqueeze(-1)
            before = take(self.x, origin.clamp(min=0))
            lost = torch.where(dropped_now, before, before if lost is None else lost)
            origin = followed
        elif origin is not None:  # every position has a token, which is much faster to follow
            origin = grouping.index.gather(1, origin)
        position = self.position
        if self.rope is not None:
            patches = grouping.keep[:, self.prefix :] - self.prefix
            position = patches if position is None else position.gather(1, patches)
        (x, *carried), total = grouping.merge_each([self.x, *self.carried.values()], weight)
        if size is not None:
            known = total if weight is size and grouping.absorbed_share is None else None
            size = grouping.sizes(size) if known is None else known
        return dataclasses.replace(
            self,
            x=x,
            size=size,
            origin=origin,
            lost=lost,
            carried=dict(zip(self.carried, carried, strict=True)),
            position=position,
        )

    def prefix_only(self) -> "Tokens":
        """The prefix tokens, without any patch token."""
        prefix = torch.arange(self.prefix, device=self.x.device).expand(self.x.shape[0], -1)
        return self.apply_grouping(Grouping.keep_only(prefix, self.x.shape[1]))

    def with_prompts(self, prompts: Tensor) -> "Tokens":
        """The same tokens, with prompts as the last prefix tokens.

        Args:
            prompts: [P, D] for all images, or [B, P, D].
        """
        at, count = self.prefix, prompts.shape[-2]

        def insert(values: Tensor, new: Tensor | float) -> Tensor:
            between = values.new_zeros(values.shape[0], count, *values.shape[2:]) + new
            return torch.cat([values[:, :at], between, values[:, at:]], dim=1)

        return dataclasses.replace(
            self,
            x=insert(self.x, prompts.to(self.x.dtype)),
            prefix=at + count,
            size=None if self.size is None else insert(self.size, 1.0),
            policy=None if self.policy is None else insert(self.policy, 1.0),
            selected=None if self.selected is None else insert(self.selected, 1.0),
            origin=_shift_origin(self.origin, at, count),
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
            origin=_shift_origin(self.origin, self.prefix, -count),
            carried={name: remove(y) for name, y in self.carried.items()},
        )

    def restore_positions(self) -> Tensor:
        """Features at every original position, [B, P, D]: all reductions are undone.

        A merged token is copied back to each of its positions. A dropped position has the features
        that it had when it was dropped. For members of a fused token, `follow_fused` decides.

        Raises:
            ValueError: If positions were not tracked.
        """
        if self.origin is None:
            raise ValueError("positions are not tracked: start from Tokens.with_tracking().")
        if self.lost is None:
            return take(self.x, self.origin)
        held = take(self.x, self.origin.clamp(min=0))
        return torch.where((self.origin < 0).unsqueeze(-1), self.lost, held)

    def with_restored(self, restored_BPD: Tensor) -> "Tokens":
        """The same tokens with features that fit changed features of all original positions.

        A token gets the mean of its positions; a dropped position gets its own features. So a
        change between two blocks, such as added positions, reaches tokens that are merged.

        Args:
            restored_BPD: What `restore_positions` returned, changed.

        Raises:
            ValueError: If positions were not tracked.
        """
        if self.origin is None:
            raise ValueError("positions are not tracked: start from Tokens.with_tracking().")
        held = (self.origin >= 0).unsqueeze(-1).to(restored_BPD.dtype)
        index = self.origin.clamp(min=0).unsqueeze(-1)
        count = restored_BPD.new_zeros(*self.x.shape[:2], 1).scatter_add(1, index, held)
        total = torch.zeros_like(self.x).scatter_add(
            1, index.expand_as(restored_BPD), restored_BPD * held
        )
        # A fused token whose members count as dropped holds no position.
        x = torch.where(count > 0, total / count.clamp(min=1), self.x)
        lost = None if self.lost is None else torch.where(held > 0, self.lost, restored_BPD)
        return dataclasses.replace(self, x=x, lost=lost)


def take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image's tokens, in the order of `index_BK`. [B, K, D]."""
    # index_select copies whole rows; gather looks up every feature, and is seven times slower.
    rows = x_BND.flatten(0, 1).index_select(0, _flat_indices(index_BK, x_BND.shape[1]))
    return rows.view(*index_BK.shape, x_BND.shape[2])


def _shift_origin(origin_BP: Tensor | None, first: int, by: int) -> Tensor | None:
    """`origin` after the tokens from `first` on have moved by `by` places."""
    return None if origin_BP is None else origin_BP + by * (origin_BP >= first)


def _flat_indices(index_BK: Tensor, num_tokens: int) -> Tensor:
    """Indices into each image's tokens as rows of all images laid end to end. [B * K]."""
    num_images = index_BK.shape[0]
    if not torch.compiler.is_exporting() and num_images == 1:  # an exported file takes any number
        return index_BK.flatten()
    first = torch.arange(0, num_images * num_tokens, num_tokens, device=index_BK.device)
    return (index_BK + first.unsqueeze(1)).flatten()


def patch_grid(tokens: Tokens) -> Tensor:
    """Patch tokens of a complete sequence as maps, [B * grids, D, rows, columns]."""
    return to_grid(tokens.x[:, tokens.prefix :], tokens.grid)


def to_grid(patches_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches as maps [M, D, rows, columns]; M is B times the grids that a sequence holds."""
    rows, columns = grid
    width = patches_BLD.shape[-1]
    maps = patches_BLD.reshape(-1, rows * columns, width)
    return maps.transpose(1, 2).reshape(maps.shape[0], width, *grid)


def from_grid(maps_MDRC: Tensor, num_patches: int) -> Tensor:
    """The inverse of `to_grid`: sequences [B, L, D] of `num_patches` patches each."""
    width = maps_MDRC.shape[1]
    return maps_MDRC.flatten(2).transpose(1, 2).reshape(-1, num_patches, width)
