"""Tokens to remove, listed layer by layer: one list, or one for each degree of the dial."""

from collections.abc import Callable, Sequence
from typing import TypeGuard

from tokendial.shape import ViTShape


def check_removed(r: object) -> None:
    """Raise a ValueError unless `r` is a count of tokens, a list of them, or a list of such lists.

    A list must not be empty, and a list of lists holds nothing but lists.
    """
    lists = r if _nested(r) else [r if isinstance(r, list) else [r]]
    if not all(some and all(type(n) is int and n >= 0 for n in some) for some in lists):
        raise ValueError(
            f"r must be an integer of at least 0, or a list of them (or of such lists), got {r}."
        )


def dial_of_lists(
    r: list[int] | list[list[int]], vit: ViTShape, most: Callable[[int], int]
) -> list[list[int]]:
    """Tokens to remove in each layer, for degree 0 (none), 1, 2, ... of the dial.

    Args:
        r: One list, or one for each degree from 1 up; missing layers are 0.
        vit: The backbone.
        most: How many of so many patch tokens can go in one layer.

    Raises:
        ValueError: If a list is longer than the model is deep, or a degree keeps more tokens than
            the one before it.
    """
    lists = r if _nested(r) else [r]
    if (longest := max(map(len, lists))) > vit.depth:
        raise ValueError(f"r must have at most {vit.depth} entries (one per layer), got {longest}.")
    dial = [[0] * vit.depth, *([*some, *[0] * (vit.depth - len(some))] for some in lists)]
    kept = [sum(patches_left(vit.num_patches, removed, most)) for removed in dial]
    for degree in range(2, len(dial)):
        if kept[degree] > kept[degree - 1]:
            raise ValueError(
                f"r must list degrees from dear to cheap, but degree {degree} keeps {kept[degree]} "
                f"patch tokens over all layers and degree {degree - 1} keeps {kept[degree - 1]}."
            )
    return dial


def patches_left(
    num_patches: int, removed: Sequence[int], most: Callable[[int], int]
) -> tuple[int, ...]:
    """Patch tokens that leave each layer.

    Args:
        num_patches: Patch tokens that enter the first one.
        removed: How many should go in each layer.
        most: How many of so many can.

    Example:
        >>> patches_left(16, [2, 0, 9], lambda patches: patches // 2)
        (14, 14, 7)
    """
    left = []
    for r in removed:
        num_patches -= min(r, most(num_patches))
        left.append(num_patches)
    return tuple(left)


def _nested(r: object) -> TypeGuard[list[list[int]]]:
    return isinstance(r, list) and bool(r) and all(isinstance(some, list) for some in r)
