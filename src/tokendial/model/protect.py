"""Patches that no reduction may touch: chosen by a mask, or by boxes in the image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokendial.reduce.base import Reducer
from tokendial.tokens import Tokens


def check_mask(mask: Tensor, reducer: Reducer | None) -> None:
    """Raise a ValueError if a mask is none, or the reduction method cannot protect patches."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3):
        kind = type(mask).__name__ if not isinstance(mask, Tensor) else f"{mask.dtype}"
        shape = f" {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise ValueError(
            f"mask must be a bool tensor [rows, columns] or [B, rows, columns] of patches, got "
            f"{kind}{shape}."
        )
    if reducer is not None and not reducer.protects:
        name = type(reducer).__name__.removesuffix("Reducer")
        raise ValueError(f"{name} cannot protect patches; use the method that it runs alone.")


def protect(tokens: Tokens, mask: Tensor, reducer: Reducer | None) -> Tokens:
    """The tokens that enter the first block, with the patches of a mask protected.

    Args:
        tokens: Tokens of B images.
        mask: [rows, columns] for all images, or [B, rows, columns]. For clips those of one time
            step, or of all of them one below the other.
        reducer: The reduction method, which says where it looks for them.

    Raises:
        ValueError: If the mask does not have the patches of these images.
    """
    images, (rows, columns) = tokens.x.shape[0], tokens.grid
    each = mask.expand(images, -1, -1) if mask.dim() == 2 else mask
    if each.shape[1:] == (rows, columns):
        each = each.repeat(1, tokens.grids, 1)
    elif rows > 1 and each.shape[1:] != (tokens.grids * rows, columns):  # one row: not known
        raise ValueError(
            f"mask must have {rows} x {columns} patches (rows x columns), got "
            f"{mask.shape[-2]} x {mask.shape[-1]}."
        )
    in_place = reducer is not None and reducer.protects_in_place
    return tokens.with_protected(each.flatten(1), in_place=in_place)


def patches_in_boxes(
    boxes: Sequence[Sequence[Sequence[float]]] | Tensor,
    image_size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Patches that boxes touch, as `DialViT.protecting` takes them.

    Args:
        boxes: For each image a list of boxes (left, top, right, bottom) in pixels of the model's
            input; right and bottom are not part of the box.
        image_size: Height and width of the input in pixels.
        grid: Rows and columns of patches.

    Returns:
        [B, rows, columns], bool, on the CPU.

    Raises:
        ValueError: If a box has no pixel in the image.

    Example:
        >>> patches_in_boxes([[(0, 0, 20, 16)]], (32, 48), (2, 3)).tolist()
        [[[True, True, False], [False, False, False]]]
    """
    height, width = image_size
    rows, columns = grid
    mask = torch.zeros(len(boxes), rows, columns, dtype=torch.bool, device="cpu")
    for number, of_image in enumerate(boxes):
        for left, top, right, bottom in of_image:
            if not (max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)):
                raise ValueError(
                    f"a box must be (left, top, right, bottom) inside of {width} x {height} pixels,"
                    f" got {(left, top, right, bottom)}."
                )
            first_row, last_row = _span(top, bottom, height / rows, rows)
            first_column, last_column = _span(left, right, width / columns, columns)
            mask[number, first_row:last_row, first_column:last_column] = True
    return mask


def _span(start: float, end: float, size: float, count: int) -> tuple[int, int]:
    """First patch that an interval of pixels touches, and the one after the last."""
    first = max(0, int(start // size))
    return first, min(count, max(first + 1, -int(-end // size)))
