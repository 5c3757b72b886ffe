"""Outputs of several blocks, chosen and returned in the way of timm's `forward_intermediates`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tokendial.backbones import Anatomy
from tokendial.model.blocks import Step
from tokendial.tokens import to_grid


def select_blocks(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Blocks counted from 0, of a model with `depth` blocks.

    Args:
        indices: Blocks, negative ones counted from the end; a number n: the last n; None: all.
        depth: Number of blocks.

    Raises:
        ValueError: If there is no such block.

    Example:
        >>> sorted(select_blocks(2, 12)), sorted(select_blocks([3, -1], 12))
        ([10, 11], [3, 11])
    """
    if indices is None:
        return set(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices must be in [1, {depth}] as a number, got {indices}.")
        return set(range(depth - indices, depth))
    if bad := [index for index in indices if not -depth <= index < depth]:
        raise ValueError(f"indices must lie in [{-depth}, {depth - 1}], got {bad[0]}.")
    if not indices:
        raise ValueError("indices must name at least one block, got none.")
    return {index % depth for index in indices}


def collect_intermediates(
    anatomy: Anatomy,
    steps: Iterable[Step],
    indices: int | Sequence[int] | None,
    *,
    return_prefix_tokens: bool,
    norm: bool,
    stop_early: bool,
    output_fmt: Literal["NCHW", "NLC"],
    intermediates_only: bool,
) -> Any:
    """Collect what `DialViT.forward_intermediates` returns.

    Args:
        anatomy: Calls the final norm of the backbone.
        steps: One run of the model with tracked tokens.
        indices: Blocks, as `select_blocks` takes them.
        return_prefix_tokens: Return a pair (patches, prefix tokens) for each block.
        norm: Apply the final norm to each.
        stop_early: Stop after the last block of `indices`.
        output_fmt: "NCHW" for maps [B, D, rows, columns], "NLC" for patches [B, L, D].
        intermediates_only: Return the list alone, without the final features.

    Raises:
        ValueError: If there is no such block, or `output_fmt` is another one.
    """
    blocks = select_blocks(indices, len(anatomy.blocks))
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}.")
    found: list[Any] = []
    for step in steps:
        if step.layer - 1 in blocks:
            rows, columns = step.tokens.grid
            x = step.tokens.restore_positions()
            x = anatomy.norm(x) if norm else x
            prefix, patches = x.tensor_split([-step.tokens.grids * rows * columns], dim=1)
            part = patches if output_fmt == "NLC" else to_grid(patches, step.tokens.grid)
            found.append((part, prefix) if return_prefix_tokens else part)
        if stop_early and step.layer - 1 == max(blocks):
            break
    if intermediates_only:
        return found
    return anatomy.norm(step.tokens.restore_positions()), found
