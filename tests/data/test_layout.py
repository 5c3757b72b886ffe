"""The parts of `tokendial.data` import in one direction only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tokendial.data

FOLDER = Path(tokendial.data.__file__).parent
MODULES = sorted(path for path in FOLDER.rglob("*.py") if path.name != "__init__.py")
MAY_IMPORT = {
    "readers": {"readers"},
    "transforms": {"transforms", "readers"},
    "splits": set(),
    "sets": {"sets", "transforms", "readers", "splits"},
    "check": {"sets", "readers"},
    "packages": set(),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of `tokendial.data` that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    known = {f"tokendial.data.{module_name(module)}" for module in MODULES}
    assert "tokendial.data" not in names, "a part of the package imports the whole package"
    return {name.removeprefix("tokendial.data.") for name in names & known}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_readers_and_transforms_know_no_data_set(path):
    part = module_name(path).split(".")[0]
    assert {name.split(".")[0] for name in imported_modules(path)} <= MAY_IMPORT[part]


def test_there_is_no_circle_of_imports():
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_imports_are_seen():
    """Guards the two tests above: they would pass if no import were found."""
    assert "readers.pixels" in imported_modules(FOLDER / "readers" / "images.py")
    assert "splits" in imported_modules(FOLDER / "sets" / "folder.py")
