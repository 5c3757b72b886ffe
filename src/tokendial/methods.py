"""The registry of methods: frozen dataclasses that recipes and saved models store as plain JSON.

A method is registered under a kind ("reduce", "adapt", "decode", "compensate", "data") and a name.
Its JSON form is `{"name": "tome", "r": 8}`. Decorating the dataclass with `register` is all that a
new method needs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T", bound=type)
V = TypeVar("V")

_REGISTRY: dict[str, dict[str, type]] = {}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: register a frozen dataclass as the method `name` of `kind`."""

    def decorate(cls: T) -> T:
        # Pydantic reads this when it validates a recipe; a plain dict keeps it out of the core.
        unchecked: Any = cls
        unchecked.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}
        _REGISTRY.setdefault(kind, {})[name] = cls
        return cls

    return decorate


def method_names(kind: str) -> tuple[str, ...]:
    """Return the names registered under `kind`, sorted."""
    return tuple(sorted(_REGISTRY.get(kind, {})))


def method_class(kind: str, name: str) -> Any:
    """Return the dataclass registered as `name`.

    Raises:
        ValueError: If nothing is registered under that name.
    """
    try:
        return _REGISTRY[kind][name]
    except (KeyError, TypeError):
        raise ValueError(
            f"{kind}.name must be one of {', '.join(method_names(kind))}, got {name!r}."
        ) from None


def to_json(kind: str, method: Any) -> dict[str, Any]:
    """Return the plain-JSON form of a method; `from_json` is the inverse."""
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
    values = {key: value for key, value in data.items() if key != "name"}
    return from_fields(cls, values, kind, data["name"])


def from_fields(cls: type[V], values: dict[str, Any], where: str, what: str) -> V:
    """Build a dataclass from plain JSON of any origin, after checking fields and types.

    Args:
        cls: The dataclass; its annotations say which types are allowed.
        values: Fields by name; fields with a default may be missing.
        where: Prefix of field names in error messages, such as "reduce".
        what: The thing that has the fields, for error messages, such as "a backbone".

    Raises:
        ValueError: If a field does not exist, is missing or of another type, or its value is not
            allowed.
    """
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"{where}.{unknown[0]} is not a field of {what}; allowed: {', '.join(sorted(fields))}."
        )
    hints = get_type_hints(cls)
    for name, field in fields.items():
        if name not in values:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}.{name} is missing.")
        elif not _fits(values[name], hints[name]):
            allowed = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            got = f"{values[name]!r:.60}"
            raise ValueError(f"{where}.{name} must be of type {allowed}, got {got}.")
    try:
        return cls(**values)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{where}: {values!r:.200} is not allowed: {error}.") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of plain JSON has an annotated type; a list may stand for a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and inner[-1] is not ...:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if origin is dict or hint in (int, str, bool, NoneType):
        return type(value) is (origin or hint)
    return True  # Any: the method itself checks it


def _plain(kind: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(kind, item) for item in value]
    # A method may hold another one of its kind.
    return to_json(kind, value) if dataclasses.is_dataclass(value) else value
