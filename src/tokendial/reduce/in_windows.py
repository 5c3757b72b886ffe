"""Reduction in windows: a method reduces the tokens of each window of the image separately.

Instead of equal windows there may be regions of any shape, see `in_regions`.

Tokens of different windows never merge, and every window keeps the same number of tokens, so that
no region of the image loses its detail to another one. Matching is cheaper, too: tokens are
compared within their window only. Attention still reads the whole image.

Source: none; it is a variant of this library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokendial.methods import register
from tokendial.reduce.base import ReducerConfig
from tokendial.reduce.in_regions import InRegionsReducer
from tokendial.reduce.part_by_part import PartByPartReducer, read_inner
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens, take


@register("reduce", "in_windows")
@dataclass(frozen=True, kw_only=True)
class InWindows(ReducerConfig):
    """Run another reduction method on each window of the image separately."""

    reduce: Any
    """The method to run, such as `ToMe(r=2)`, or its plain-JSON form. Its numbers of tokens count
    for one window."""
    windows: tuple[int, int] = (2, 2)
    """Number of windows in a column and in a row. They must divide the rows and the columns of
    patches."""
    regions: Sequence[Sequence[int]] | None = None
    """Instead of `windows`: a number for each patch, as rows of columns. Patches of the same number
    form a region of any shape and size. The method's `r` counts for the whole image then, and each
    region loses the share of its patches that the image loses. Methods: ToMe, EViT by `r`, PiToMe
    by `r`, PruneMerge."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduce", read_inner(self.reduce, "in_windows"))
        pair: object = self.windows
        if not isinstance(pair, list | tuple) or not (
            len(pair) == 2 and all(type(count) is int and count >= 1 for count in pair)
        ):
            raise ValueError(f"windows must be two integers of at least 1, got {pair!r}.")
        object.__setattr__(self, "windows", tuple(pair))
        if self.regions is not None:
            if self.windows != (2, 2):
                raise ValueError(f"set windows or regions, not both: got windows={self.windows}.")
            object.__setattr__(self, "regions", _checked_regions(self.regions))

    def build(self, vit: ViTShape) -> "InWindowsReducer | InRegionsReducer":
        """Make the module.

        Raises:
            ValueError: If the backbone takes clips, the method does not fit one window, or the
                regions do not fit the backbone.
        """
        if vit.num_grids > 1:
            raise ValueError("in_windows is for images; for clips there is frame_by_frame.")
        if self.regions is not None:
            return InRegionsReducer(self.reduce, self.regions, vit)
        return InWindowsReducer(self, vit)


def _checked_regions(rows: object) -> tuple[tuple[int, ...], ...]:
    """The rows as tuples; a ValueError unless they are equally long lists of integers."""
    if isinstance(rows, list | tuple) and rows and all(isinstance(r, list | tuple) for r in rows):
        frozen = tuple(map(tuple, rows))
        are_integers = all(type(number) is int for row in frozen for number in row)
        if len({len(row) for row in frozen}) == 1 and frozen[0] and are_integers:
            return frozen
    raise ValueError(
        f"regions must be rows of as many integers each, one for a patch, got {rows!r:.60}."
    )


class InWindowsReducer(PartByPartReducer):
    """Runs the inner method on each window."""

    def __init__(self, config: InWindows, vit: ViTShape) -> None:
        self.windows = config.windows
        super().__init__(config.reduce, vit, self.windows[0] * self.windows[1])
        self.keeps_grid = False
        self.reads_grid_shape = True

    def parts(self, tokens: Tokens) -> Tokens:
        """The tokens as those of as many images as there are windows."""
        (rows, columns), (down, across) = tokens.grid, self.windows
        return replace(tokens, grids=down * across, grid=(rows // down, columns // across))

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Put the patches of each window together before the first block."""
        order_BL = self._order(tokens)
        if layer == 1:
            tokens = tokens.reordered(order_BL)
        if tokens.origin is None:
            return super().before_block(layer, degree, tokens)
        # Original positions have to stand in the order of the windows, too, while they are split.
        prefix = torch.arange(tokens.origin.shape[1] - order_BL.shape[1], device=order_BL.device)
        order_BP = torch.cat([prefix.expand(order_BL.shape[0], -1), len(prefix) + order_BL], dim=1)
        prepared = super().before_block(layer, degree, _with_positions(tokens, order_BP))
        return _with_positions(prepared, order_BP.argsort(dim=1))

    def _order(self, tokens: Tokens) -> Tensor:
        """Patches [B, L], one window after another.

        Raises:
            ValueError: If the windows do not divide the grid.
        """
        (rows, columns), (down, across) = tokens.grid, self.windows
        if rows % down or columns % across:
            raise ValueError(
                f"windows must divide the {rows} x {columns} patches, got {down} x {across}."
            )
        number = torch.arange(rows * columns, device=tokens.x.device)
        order = number.view(down, rows // down, across, columns // across).transpose(1, 2)
        return order.flatten().expand(tokens.x.shape[0], -1)


def _with_positions(tokens: Tokens, order_BP: Tensor) -> Tokens:
    """The tokens with their original positions in another order."""
    origin, lost = tokens.origin, tokens.lost
    return replace(
        tokens,
        origin=None if origin is None else origin.gather(1, order_BP),
        lost=None if lost is None else take(lost, order_BP),
    )
