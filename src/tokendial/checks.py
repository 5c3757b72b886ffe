"""Checks of settings: a ValueError names the setting, its value and what is allowed."""


def check_share(name: str, share: object) -> None:
    """Raise a ValueError unless `share` is a number in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share}.")


def check_own_layers(layers: tuple[int, ...]) -> None:
    """Raise a ValueError unless `layers` are layers, each named once."""
    if not layers or any(type(n) is not int or n < 1 for n in layers):
        raise ValueError(f"layers must be integers from 1 up, got {layers}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers must differ from each other, got {layers}.")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def check_layers(layers: tuple[int, ...], depth: int) -> None:
    """Raise a ValueError unless every layer exists in a model of `depth` blocks."""
    if bad := [layer for layer in layers if layer > depth]:
        raise ValueError(f"layers must lie in [1, {depth}] (counted from 1), got {bad[0]}.")


def check_bottleneck(dim: int, scale: float) -> None:
    """Raise a ValueError unless the width and the scale of a bottleneck make sense."""
    if type(dim) is not int or dim < 1:
        raise ValueError(f"dim must be an integer of at least 1, got {dim}.")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise ValueError(f"scale must be a number above 0, got {scale}.")
