"""Checks of settings.

Each check raises a ValueError that names the setting, the values that are allowed, and the value
that was given. A bool is not an integer, and NaN and infinity are not numbers.
"""

import math
from collections.abc import Sequence
from typing import TypeGuard


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """Raise a ValueError unless `value` is an integer of at least `at_least`.

    Example:
        >>> check_count("rank", True)
        Traceback (most recent call last):
        ...
        ValueError: rank must be an integer of at least 1, got True.
    """
    if type(value) is not int or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite number above 0."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")


def check_not_negative(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite number of at least 0."""
    if not _is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")


def check_fraction(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a number in (0, 1], such as a keep rate."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}.")


def check_dropout(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a number in [0, 1), a probability of dropping."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def check_layers(layers: Sequence[int]) -> None:
    """Raise a ValueError unless `layers` holds different layer numbers, counted from 1."""
    if not layers or any(type(layer) is not int or layer < 1 for layer in layers):
        raise ValueError(f"layers must be integers of at least 1, got {layers}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers must differ from each other, got {layers}.")


def check_layers_exist(layers: Sequence[int], depth: int) -> None:
    """Raise a ValueError unless a model of `depth` blocks has every layer."""
    if missing := [layer for layer in layers if layer > depth]:
        raise ValueError(f"layers must lie in [1, {depth}] (counted from 1), got {missing[0]}.")


def check_bottleneck(dim: object, scale: object) -> None:
    """Raise a ValueError unless `dim` and `scale` describe a bottleneck."""
    check_count("dim", dim)
    check_positive("scale", scale)


def check_target_modules(targets: Sequence[str]) -> None:
    """Raise a ValueError unless `targets` names at least one layer."""
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise ValueError(f"target_modules must name at least one layer, got {targets}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
