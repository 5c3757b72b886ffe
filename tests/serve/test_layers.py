"""Which way imports point inside of the server."""

import ast
from pathlib import Path

import pytest

import tokendial.serve

SOURCE = Path(tokendial.serve.__file__).parent
# From the top down: a module may import from its own layer and from those below it.
LAYERS = (
    ("ray",),
    ("starting",),
    ("http",),
    ("workers",),
    ("scheduling",),
    ("settings", "problems"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in LAYER]
WEB = {"fastapi", "starlette", "uvicorn"}


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards_and_only_http_knows_the_web_framework(path):
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    for name in imported(path):
        if name.startswith("tokendial.serve."):
            other = name.split(".")[2]
            assert LAYER[other] >= LAYER[own], f"{own} imports {other}"
        if own not in ("http", "ray"):
            assert name.split(".")[0] not in WEB, f"{own} imports {name}"
