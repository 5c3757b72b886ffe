"""Methods are values: frozen dataclasses that a recipe, a saved model or a user writes down.

A method is registered under a kind ("reduce", "adapt", "data") and a name, and travels as
plain JSON: `{"name": "tome", "r": 8}`. Adding a method means decorating its dataclass; no other
list needs to know about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_REGISTRY: dict[str, dict[str, type]] = {}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a frozen dataclass known as method `name` of `kind`."""

    def decorate(cls: T) -> T:
        # Pydantic reads this when it validates a recipe; a plain dict keeps it out of the core.
        unchecked: Any = cls
        unchecked.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}
        _REGISTRY.setdefault(kind, {})[name] = cls
        return cls

    return decorate


def known(kind: str) -> tuple[str, ...]:
    """Names registered under `kind`, sorted."""
    return tuple(sorted(_REGISTRY.get(kind, {})))


def method_class(kind: str, name: str) -> Any:
    """The dataclass registered as `name`.

    Raises:
        ValueError: If nothing is registered under that name.
    """
    try:
        return _REGISTRY[kind][name]
    except (KeyError, TypeError):
        raise ValueError(
            f"{kind}.name must be one of {', '.join(known(kind))}, got {name!r}."
        ) from None


def to_json(kind: str, method: Any) -> dict[str, Any]:
    """Plain-JSON form of a method, the inverse of `from_json`."""
    for name, cls in _REGISTRY[kind].items():
        if type(method) is cls:
            fields = dataclasses.fields(cls)
            return {"name": name} | {f.name: _plain(kind, getattr(method, f.name)) for f in fields}
    raise ValueError(f"{type(method).__name__} is not a registered {kind} method.")


def from_json(kind: str, data: dict[str, Any]) -> Any:
    """Rebuild a method from its plain-JSON form.

    Raises:
        ValueError: If the name is unknown, a field does not exist, or a value is not allowed.
    """
    if not isinstance(data, dict) or "name" not in data:
        raise ValueError(f"{kind} must be a mapping with a name, got {data!r}.")
    cls = method_class(kind, data["name"])
    fields = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in data.items() if key != "name"}
    if unknown := sorted(set(values) - fields):
        raise ValueError(
            f"{kind}.{unknown[0]} is not a field of {data['name']}; "
            f"allowed: {', '.join(sorted(fields))}."
        )
    return cls(**values)


def _plain(kind: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(kind, item) for item in value]
    # A method may hold another one of its kind.
    return to_json(kind, value) if dataclasses.is_dataclass(value) else value
