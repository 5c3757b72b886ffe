"""The description of the requests as a page that needs no scripts and no other server."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: requests</title>
<link rel="stylesheet" href="page/page.css">
</head>
<body class="text">
<header><h1>{title}</h1></header>
<main>
<p>{description}</p>
<p>For programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="./">the page</a>.
Where the server asks for an API key, requests bring it as <code>Authorization: Bearer KEY</code> or
<code>X-API-Key: KEY</code>.</p>
{paths}
{schemas}
</main>
</body>
</html>
"""


def api_page(openapi: Mapping[str, Any]) -> str:
    """Write the page.

    Args:
        openapi: An OpenAPI document, as FastAPI makes it.
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
        if "ValidationError" not in name  # FastAPI's own, which is never answered
    ]
    return _PAGE.format(
        title=escape(info["title"]),
        description=escape(info["description"]),
        paths="\n".join(operations),
        schemas="\n".join(schemas),
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    told = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>"]
    told += [f"<p>{escape(part)}</p>" for part in operation["description"].split("\n\n")]
    if operation.get("parameters"):
        rows = (
            (parameter["name"], _kind(parameter["schema"]), _words(parameter, parameter["schema"]))
            for parameter in operation["parameters"]
        )
        told += ["<h3>Query</h3>", _table(rows)]
    if "requestBody" in operation:
        told.append("<h3>Body</h3>")
        bodies = operation["requestBody"]["content"].items()
        told.append(_table((kind, _kind(body["schema"]), "") for kind, body in bodies))
        told += [
            _schema(body["schema"]["title"], body["schema"])
            for _, body in bodies
            if "title" in body["schema"]
        ]
    answers = (
        (status, " ".join(map(_kind, _schemas(answer))), answer["description"])
        for status, answer in operation["responses"].items()
    )
    return "\n".join([*told, "<h3>Answers</h3>", _table(answers)])


def _schemas(answer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (content["schema"] for content in answer.get("content", {}).values())


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    rows = ((field, _kind(of), _words(of)) for field, of in schema.get("properties", {}).items())
    return f"<h3><code>{escape(name)}</code></h3>\n{_table(rows)}"


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value is, in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("title") if "properties" in schema else schema.get("type", "any"))


def _words(*schemas: Mapping[str, Any]) -> str:
    """What is said of it: the first description, and the default."""
    told = next((schema["description"] for schema in schemas if "description" in schema), "")
    default = next((schema["default"] for schema in schemas if "default" in schema), None)
    return told if default is None else f"{told} Default: {default}."


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = (
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(words)}</td>"
        for name, kind, words in rows
    )
    return "\n".join(["<table>", *lines, "</table>"])
