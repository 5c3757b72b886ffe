"""Fields of recipes that hold a registered method: how they are read, written and described."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter

from tokendial.methods import method_class, method_names, to_json


def method_field(kind: str) -> Any:
    """The type of a field that holds a registered method, written as a mapping with a `name`."""

    def read(value: Any) -> Any:
        if value is None or dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(
                f"must be a mapping with a name, one of {', '.join(method_names(kind))}"
            )
        cls = method_class(kind, value["name"])
        return TypeAdapter(cls).validate_python({k: v for k, v in value.items() if k != "name"})

    def write(value: Any) -> Any:
        return None if value is None else to_json(kind, value)

    return Annotated[Any, BeforeValidator(read), PlainSerializer(write), _MethodSchema(kind)]


@dataclasses.dataclass(frozen=True, slots=True)
class _MethodSchema:
    """Lists the methods of a kind and their settings in the JSON schema of a recipe."""

    kind: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [*map(self._method, method_names(self.kind)), {"type": "null"}]}

    def _method(self, name: str) -> dict[str, Any]:
        cls = method_class(self.kind, name)
        schema = TypeAdapter(cls).json_schema()
        describe_fields(schema, cls)
        # Required settings may stand in the base of a recipe file, or on the command line.
        schema.pop("required", None)
        return schema | {"properties": {"name": {"const": name}} | schema.get("properties", {})}


def describe_fields(schema: dict[str, Any], cls: type) -> None:
    """Add the docstrings of a dataclass's fields to its JSON schema, as their descriptions."""
    properties = schema.get("properties", {})
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # a class without a source file, as in interactive sessions
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            match field, doc:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ) if name in properties:
                    properties[name]["description"] = inspect.cleandoc(text)
