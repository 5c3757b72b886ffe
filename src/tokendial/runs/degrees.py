"""Which degrees of a dial a command looks at: as written by the user, or a choice by cost."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from tokendial.model.dial_vit import DialViT

_LISTED = 12
"""A dial with more degrees than this is evaluated at a choice of them unless all are asked for."""
_SPREAD = 10
"""How many degrees are chosen from a longer dial; the one that was trained can be one more."""


def parse_degrees(text: str, offered: tuple[int, ...]) -> list[int]:
    """Degrees written as "0,4,8", "0..16", "0..16:4", "all" or "every".

    Args:
        text: As above; "all" and "every" are all that are offered. Where "all" is to mean a choice
            from a long dial, `degrees_to_show` makes it.
        offered: Degrees of the dial, rising.

    Raises:
        ValueError: If the text is none of these, or a degree is not offered.

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
    """At most `count` degrees that are about evenly spaced in cost, the first and last included.

    Args:
        offered: Degrees of the dial, rising.
        cost: Cost at a degree, which falls along the dial. Asked at few of them.
        count: How many, at least 2.
        also: An offered degree that is included, too, in place of one whose cost is near; None:
            no other.
    """
    known = cache(cost)
    most, least = known(offered[0]), known(offered[-1])
    step = (most - least) / (count - 1)
    chosen = {offered[0], offered[-1]}
    if also is not None:
        chosen.add(also)
    for part in range(1, count - 1):
        wanted = most - part * step
        after = bisect_left(offered, -wanted, key=lambda degree: -known(degree))
        beside = offered[max(0, after - 1) : after + 1]
        near = min(beside, key=lambda degree: abs(known(degree) - wanted))
        if also is None or abs(known(near) - known(also)) > step / 2:
            chosen.add(near)
    return sorted(chosen)


def spread_degrees(model: DialViT, count: int, offered: tuple[int, ...] | None = None) -> list[int]:
    """About `count` degrees of a model that are evenly spaced in cost; its present one is included.

    Args:
        model: A wrapped model.
        count: How many, at least 2.
        offered: Degrees to choose from; None: all of the model's.
    """
    offered = offered or model.degrees
    present = model.degree if model.degree in offered else None
    return spread_by_cost(offered, lambda d: float(model.cost(d).macs), count, also=present)


def degrees_to_show(model: DialViT, text: str, offered: tuple[int, ...] | None = None) -> list[int]:
    """Degrees written as `parse_degrees` takes them; "all" of a long dial include the present one.

    Args:
        model: A wrapped model, at the degree that it was trained at.
        text: Such as "0,4,8" or "all".
        offered: Degrees to choose from; None: all of the model's.

    Raises:
        ValueError: If a degree is not offered.
    """
    offered = offered or model.degrees
    if text == "all" and len(offered) > _LISTED:
        return spread_degrees(model, _SPREAD, offered)
    return parse_degrees(text, offered)
