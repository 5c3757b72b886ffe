"""Which blocks `forward_intermediates` returns, in timm's way of naming them."""

from collections.abc import Sequence


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
