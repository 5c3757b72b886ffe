"""The API description as an HTML page that needs no scripts and no other server."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: API</title>
<link rel="stylesheet" href="page/page.css">
</head>
<body class="text">
<header><h1>{title}</h1></header>
<main>
<p>{description}</p>
<p>For programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="./">the page</a>.
If the server asks for an API key, send it as <code>Authorization: Bearer KEY</code> or
<code>X-API-Key: KEY</code>.</p>
{paths}
{schemas}
</main>
</body>
</html>
"""


def api_page(openapi: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        openapi: OpenAPI document that FastAPI has generated.
    """
    info = openapi["info"]
    operations = [
        _operation(method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [
        _schema(name, schema)
        for name, schema in openapi["components"]["schemas"].items()
        if "ValidationError" not in name  # FastAPI's own error bodies are never sent
    ]
    return _PAGE.format(
        title=escape(info["title"]),
        description=escape(info["description"]),
        paths="\n".join(operations),
        schemas="\n".join(schemas),
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>"]
    parts += [f"<p>{escape(part)}</p>" for part in operation["description"].split("\n\n")]
    if operation.get("parameters"):
        rows = (
            (
                parameter["name"],
                _type_name(parameter["schema"]),
                _description(parameter, parameter["schema"]),
            )
            for parameter in operation["parameters"]
        )
        parts += ["<h3>Query</h3>", _table(rows)]
    if "requestBody" in operation:
        parts.append("<h3>Body</h3>")
        bodies = operation["requestBody"]["content"].items()
        parts.append(_table((kind, _type_name(body["schema"]), "") for kind, body in bodies))
        parts += [
            _schema(body["schema"]["title"], body["schema"])
            for _, body in bodies
            if "title" in body["schema"]
        ]
    responses = (
        (status, " ".join(map(_type_name, _response_schemas(response))), response["description"])
        for status, response in operation["responses"].items()
    )
    return "\n".join([*parts, "<h3>Answers</h3>", _table(responses)])


def _response_schemas(response: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (content["schema"] for content in response.get("content", {}).values())


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    rows = (
        (field, _type_name(of), _description(of))
        for field, of in schema.get("properties", {}).items()
    )
    return f"<h3><code>{escape(name)}</code></h3>\n{_table(rows)}"


def _type_name(schema: Mapping[str, Any]) -> str:
    """Describe the type of a value in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_type_name, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type_name(schema.get('items', {}))}"
    return str(schema.get("title") if "properties" in schema else schema.get("type", "any"))


def _description(*schemas: Mapping[str, Any]) -> str:
    """First description that the schemas have, and the default."""
    parts = next((schema["description"] for schema in schemas if "description" in schema), "")
    default = next((schema["default"] for schema in schemas if "default" in schema), None)
    return parts if default is None else f"{parts} Default: {default}."


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = (
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(words)}</td>"
        for name, kind, words in rows
    )
    return "\n".join(["<table>", *lines, "</table>"])
