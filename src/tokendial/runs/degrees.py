"""Lists of degrees: parsed from text, or chosen evenly by cost."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from tokendial.measure.cost import Cost

_MAX_LISTED = 12
"""Longest dial of which "all" means every degree."""
_NUM_CHOSEN = 10
"""Degrees that "all" chooses from a longer dial. The trained degree can be one more."""


class Dial(Protocol):
    """What has a dial: a wrapped model, or the handle of `attach`."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Positions of the dial, rising."""

    @property
    def degree(self) -> int:
        """The present degree."""

    def cost(self, degree: int | None = None) -> Cost:
        """Cost of one image at a degree; None: at the present one."""


def parse_degrees(text: str, offered: tuple[int, ...]) -> list[int]:
    """Parse degrees written as "0,4,8", "0..16", "0..16:4", "all" or "every".

    Args:
        text: The text. "all" and "every" both give all offered degrees here; see `degrees_to_show`.
        offered: Degrees of the dial, rising.

    Raises:
        ValueError: If the text has none of these forms, or a degree is not offered.

    Example:
        >>> parse_degrees("0..8:4,1", tuple(range(17)))
        [0, 4, 8, 1]
    """
    if text in ("all", "every"):
        return list(offered)
    degrees: list[int] = []
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, dots, last = span.partition("..")
        try:
            if dots:
                degrees += range(int(first), int(last) + 1, int(step or 1))
            else:
                degrees.append(int(part))
        except ValueError:
            raise ValueError(
                "degrees must look like 0,4,8 or 0..16 or 0..16:4, or be all or every, "
                f"got {text!r}."
            ) from None
    if not degrees:
        raise ValueError(f"degrees: {text!r} names none; a span must rise, as in 0..16.")
    if bad := [degree for degree in degrees if degree not in offered]:
        raise ValueError(f"degrees must lie in [0, {offered[-1]}], got {bad[0]}.")
    return degrees


def spread_by_cost(
    offered: Sequence[int], cost: Callable[[int], float], count: int, also: int | None = None
) -> list[int]:
    """Choose degrees that are about evenly spaced in cost, with the first and the last degree.

    Args:
        offered: Degrees of the dial, rising.
        cost: Gives the cost at a degree. It must not rise along the dial. It is called for few
            degrees, because the search is by bisection.
        count: Number of degrees to choose, at least 2.
        also: An offered degree that must be included. It replaces a chosen degree of similar
            cost, or is one more.

    Returns:
        The degrees, rising.
    """
    known = cache(cost)
    highest, lowest = known(offered[0]), known(offered[-1])
    step = (highest - lowest) / (count - 1)
    chosen = {offered[0], offered[-1]}
    if also is not None:
        chosen.add(also)
    for part in range(1, count - 1):
        target = highest - part * step
        after = bisect_left(offered, -target, key=lambda degree: -known(degree))
        neighbours = offered[max(0, after - 1) : after + 1]
        nearest = min(neighbours, key=lambda degree: abs(known(degree) - target))
        if also is None or abs(known(nearest) - known(also)) > step / 2:
            chosen.add(nearest)
    return sorted(chosen)


def spread_degrees(model: Dial, count: int, offered: tuple[int, ...] | None = None) -> list[int]:
    """Choose about `count` degrees of a model, evenly spaced in cost, with its present degree.

    Args:
        model: A wrapped model, or the handle of `attach`.
        count: Number of degrees to choose, at least 2.
        offered: Degrees to choose from. None means all degrees of the model.
    """
    offered = offered or model.degrees
    present = model.degree if model.degree in offered else None
    return spread_by_cost(offered, lambda d: float(model.cost(d).macs), count, also=present)


def degrees_to_show(model: Dial, text: str, offered: tuple[int, ...] | None = None) -> list[int]:
    """Parse degrees as `parse_degrees` does, but choose about ten where "all" would be many.

    The choice is evenly spaced in cost and includes the model's present degree.

    Args:
        model: A wrapped model at the degree that it was trained at, or the handle of `attach`.
        text: Degrees as text, such as "0,4,8", "all" or "every".
        offered: Degrees to choose from. None means all degrees of the model.

    Raises:
        ValueError: If a degree is not offered.
    """
    offered = offered or model.degrees
    if text == "all" and len(offered) > _MAX_LISTED:
        return spread_degrees(model, _NUM_CHOSEN, offered)
    return parse_degrees(text, offered)
