"""Schedules: how many tokens each layer removes, written as one list or one list per degree.

A layer's entry is a number of tokens (an integer), or a share of the image's patches (a float) that
means the same at every image size.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias, TypeGuard

from tokendial.reduce.base import ReducerConfig
from tokendial.shape import ViTShape


class ScheduledConfig(ReducerConfig):
    """Settings that can say how many tokens each layer removes. `td.fit` finds such schedules."""

    r: Any
    """Tokens that each layer removes: one number, one schedule, one schedule for each degree, or
    None where the settings say it in another way."""

    def schedules(self, vit: ViTShape) -> list[list[int]]:
        """Tokens that each layer of a backbone removes at degree 1, 2, ...; [] unless `r` is lists.

        Raises:
            ValueError: If the lists do not fit the backbone, see `make_schedule_dial`.
        """
        r = None if self.r is None else freeze_removal(self.r)
        if r is None or isinstance(r, int):
            return []
        return make_schedule_dial(r, vit, self.max_removed)[1:]

    @abstractmethod
    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can remove of `num_patches`."""

    @abstractmethod
    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> Self:
        """The same method with these schedules as its degrees 1, 2, ...

        Args:
            schedules: Tokens, or shares of the patches, to remove in each layer, from the most to
                the least expensive.
        """

    def variants(self) -> dict[str, Self]:
        """The method with other values of a setting that `td.fit` searches beside the schedules.

        Returns:
            The methods, by what differs in them, such as "prune_share 0.25".
        """
        return {}


class PerLayer(tuple[int | float, ...]):
    """What to remove in each layer, from the first on; an unchangeable list.

    An integer is a number of tokens, a float a share of the patches that enter the first layer.

    It is a class of its own because `ToMe` reads a plain tuple of two numbers as (r, inflection).
    It prints as a list, so that the printed form of a method can be read back.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(list(self))

    def counts(self, num_patches: int) -> list[int]:
        """Number of tokens to remove in each layer.

        Shares add up before they are rounded, so that many small ones are not lost.

        Args:
            num_patches: Patch tokens that enter the first layer.

        Example:
            >>> PerLayer([0.1, 0.1, 3]).counts(16)
            [2, 1, 3]
        """
        counts, share = [], 0.0
        for each in self:
            if isinstance(each, int):
                counts.append(each)
            else:
                counts.append(round((share + each) * num_patches) - round(share * num_patches))
                share += each
        return counts


Removal: TypeAlias = int | PerLayer | tuple[PerLayer, ...]
"""Tokens to remove: one number for every layer, one per layer, or one list for each degree."""


def freeze_removal(r: object) -> Removal:
    """Return the checked and hashable form of `r`.

    Args:
        r: One number of tokens, a list with one entry per layer, or a list of such lists, one for
            each degree from 1 up. In a list, a float is a share of the image's patches. Tuples may
            stand for lists.

    Raises:
        ValueError: If a number is below 0, a share is above 1, a list is empty, or a list holds
            both lists and numbers.
    """
    if type(r) is int and r >= 0:
        return r
    if _is_schedule(r):
        return PerLayer(r)
    if isinstance(r, list | tuple) and r and all(map(_is_schedule, r)):
        return tuple(map(PerLayer, r))
    raise ValueError(
        "r must be an integer of at least 0, or a list of integers of at least 0 and shares of the "
        f"patches in [0.0, 1.0] (or a list of such lists), got {r!r}."
    )


def _is_schedule(value: object) -> TypeGuard[Sequence[int | float]]:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(
        (type(each) is int and each >= 0) or (type(each) is float and 0.0 <= each <= 1.0)
        for each in value
    )


def make_schedule_dial(
    r: PerLayer | tuple[PerLayer, ...], vit: ViTShape, max_removed: Callable[[int], int]
) -> list[list[int]]:
    """Return the tokens to remove in each layer at degree 0 (none), 1, 2, ... of the dial.

    Args:
        r: One schedule, or one for each degree from 1 up. Missing last layers remove none.
        vit: The backbone.
        max_removed: Takes a number of patch tokens; returns how many of them one layer can remove
            at most.

    Raises:
        ValueError: If a schedule has more entries than the model has layers, or a degree keeps
            more tokens than the degree before it.
    """
    schedules = (r,) if isinstance(r, PerLayer) else r
    if (longest := max(map(len, schedules))) > vit.depth:
        raise ValueError(f"r must have at most {vit.depth} entries (one per layer), got {longest}.")
    dial = [[0] * vit.depth]
    for schedule in schedules:
        dial.append([*schedule.counts(vit.num_patches), *[0] * (vit.depth - len(schedule))])
    kept = [sum(patches_after_layers(vit.num_patches, schedule, max_removed)) for schedule in dial]
    for degree in range(2, len(dial)):
        if kept[degree] > kept[degree - 1]:
            raise ValueError(
                "r must list the degrees from the most to the least expensive one, but degree "
                f"{degree} keeps {kept[degree]} patch tokens over all layers and degree "
                f"{degree - 1} keeps {kept[degree - 1]}."
            )
    return dial


def make_removal_dial(
    r: Removal, vit: ViTShape, max_removed: Callable[[int], int], *, highest: int
) -> tuple[list[list[int]], int]:
    """Return the tokens to remove in each layer at each degree, and the degree that `r` describes.

    Args:
        r: One number, which is its own degree, or schedules, see `make_schedule_dial`.
        vit: The backbone.
        max_removed: See `make_schedule_dial`.
        highest: Highest degree of a dial of single numbers.

    Raises:
        ValueError: If schedules do not fit, see `make_schedule_dial`.
    """
    if isinstance(r, int):
        return [[degree] * vit.depth for degree in range(highest + 1)], r
    return make_schedule_dial(r, vit, max_removed), 1


def patches_after_layers(
    num_patches: int, removed: Sequence[int], max_removed: Callable[[int], int]
) -> tuple[int, ...]:
    """Return the number of patch tokens after each layer.

    Args:
        num_patches: Patch tokens that enter the first layer.
        removed: Tokens to remove in each layer.
        max_removed: Takes a number of patch tokens; returns how many of them one layer can remove
            at most. Larger numbers in `removed` are lowered to it.

    Example:
        >>> patches_after_layers(16, [2, 0, 9], lambda num_patches: num_patches // 2)
        (14, 14, 7)
    """
    left = []
    for r in removed:
        num_patches -= min(r, max_removed(num_patches))
        left.append(num_patches)
    return tuple(left)
