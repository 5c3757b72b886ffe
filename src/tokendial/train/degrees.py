"""Which degrees of a dial a command looks at: as written by the user, or a choice by cost."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache

from tokendial.vit import DialViT

_LISTED = 12
"""A dial with more degrees than this is evaluated at a choice of them unless all are asked for."""
_SPREAD = 10
"""How many degrees are chosen from a longer dial, besides the one that was trained."""


def parse_degrees(
    text: str, offered: tuple[int, ...], cost: Callable[[int], float] | None = None
) -> list[int]:
    """Degrees written as "0,4,8", "0..16", "0..16:4", "all" or "every".

    Args:
        text: As above. "every": all that are offered. "all": the same for a short dial; of a long
            one, on which neighbours hardly differ, about ten that are evenly spaced in cost.
        offered: Degrees of the dial, rising.
        cost: Cost at a degree, which falls along the dial; None: "all" is "every".

    Raises:
        ValueError: If the text is none of these, or a degree is not offered.

    Example:
        >>> parse_degrees("0..8:4", tuple(range(17)))
        [0, 4, 8]
        >>> parse_degrees("all", tuple(range(101)), cost=lambda degree: 200.0 - degree)
        [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    """
    if text == "every" or (text == "all" and (cost is None or len(offered) <= _LISTED)):
        return list(offered)
    if text == "all" and cost is not None:
        return spread_by_cost(offered, cost, _SPREAD)
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


def spread_by_cost(offered: Sequence[int], cost: Callable[[int], float], count: int) -> list[int]:
    """At most `count` degrees that are about evenly spaced in cost, the first and last included.

    Args:
        offered: Degrees of the dial, rising.
        cost: Cost at a degree, which falls along the dial. Asked at few of them.
        count: How many, at least 2.
    """
    known = lru_cache(maxsize=None)(cost)
    first, last = known(offered[0]), known(offered[-1])
    wanted = (first + (last - first) * part / (count - 1) for part in range(1, count - 1))

    def nearest(target: float) -> int:
        after = bisect_left(offered, -target, key=lambda degree: -known(degree))
        beside = offered[max(0, after - 1) : after + 1]
        return min(beside, key=lambda degree: abs(known(degree) - target))

    return sorted({offered[0], *map(nearest, wanted), offered[-1]})


def degrees_to_show(model: DialViT, text: str, offered: tuple[int, ...] | None = None) -> list[int]:
    """Degrees written as `parse_degrees` takes them; of "all", the one set on the model is one.

    Args:
        model: A wrapped model, at the degree that it was trained at.
        text: Such as "0,4,8" or "all".
        offered: Degrees to choose from; None: all of the model's.

    Raises:
        ValueError: If a degree is not offered.
    """
    offered = offered or model.degrees
    found = parse_degrees(text, offered, lambda degree: float(model.cost(degree).macs))
    return sorted({*found, model.degree} & {*offered}) if text == "all" else found
