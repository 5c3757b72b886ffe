"""The house looks like its plan: which way imports point, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokendial

SOURCE = Path(tokendial.__file__).parent
# From the roof down: a module may import from its own floor and from those below it.
FLOORS = (
    ("cli",),
    ("demo", "reproduce", "serve", "sweeps"),
    ("train",),
    ("show", "export"),
    ("runs",),
    ("tasks", "data"),
    ("reference",),
    ("compensate", "tune"),
    ("model",),
    ("backbones", "measure"),
    ("adapt",),
    ("decode",),
    ("reduce",),
    ("attention", "passes"),
    ("tokens", "shape", "checks", "methods", "atomic", "errors", "weights", "hub", "signals"),
    ("kernels",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
CORE = {room for room, floor in FLOOR.items() if floor >= FLOOR["reference"]}
CORE_MAY_IMPORT = {"torch", "timm", "safetensors", "huggingface_hub", "tokendial"}
# Imported when the first kernel starts: the library runs where there is no Triton, too.
WITH_TRITON = SOURCE / "kernels" / "programs.py"
UPWARD: set[tuple[str, str]] = set()


def modules() -> dict[Path, str]:
    """Every module and the room that it belongs to."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts != ("__init__",):
            found[path] = parts[0]
    return found


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    room = modules()[path]
    for name in imports(path):
        package, _, rest = name.partition(".")
        below = rest.split(".")[0]
        if package == "tokendial" and below and (room, below) not in UPWARD:
            assert FLOOR[below] >= FLOOR[room], f"{room} imports {below}"


@pytest.mark.parametrize(
    "path",
    [path for path, room in modules().items() if room in CORE and path != WITH_TRITON],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_the_core_needs_few_packages(path):
    packages = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert packages - set(sys.stdlib_module_names) <= CORE_MAY_IMPORT


def test_importing_the_library_loads_nothing_heavy():
    heavy = {"accelerate", "torchmetrics", "matplotlib", "typer", "peft", "transformers"}
    heavy.add("tokendial.kernels.programs")
    code = f"import sys, tokendial; tokendial.wrap; print(sorted({heavy} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(SOURCE.parent), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_without_torch():
    code = "import sys, tokendial.cli; print('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(SOURCE.parent), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "False"


def test_public_names_are_there():
    assert all(hasattr(tokendial, name) for name in tokendial.__all__)


def test_asserts_only_narrow_types():
    """`python -O` leaves them out: what checks or does something else stands in a statement."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                told = ast.unparse(node.test)
                assert told.endswith(" is not None") or told.startswith("isinstance("), (path, told)
