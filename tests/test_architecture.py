"""The house looks like its plan: which way imports point, what is public, what each name needs."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tokendial
from tokendial.extras import EXTRAS

SOURCE = Path(tokendial.__file__).parent
PROJECT = SOURCE.parent.parent / "pyproject.toml"
# From the roof down: a module may import from its own floor and from those below it.
FLOORS = (
    ("cli",),
    ("demo", "reproduce", "serve", "sweeps"),
    ("train",),
    ("show",),
    ("runs",),
    ("tasks", "data"),
    ("reference", "runtimes"),
    ("cascade", "compensate", "export_files", "tune"),
    ("open_vocabulary",),
    ("model",),
    ("backbones", "measure"),
    ("adapt",),
    ("decode",),
    ("reduce",),
    ("attention", "passes"),
    (
        "tokens", "shape", "checks", "methods", "atomic", "errors", "extras", "weights", "hub",
        "signals",
    ),
    ("kernels",),
)  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
CORE = {room for room, floor in FLOOR.items() if floor >= FLOOR["reference"]}
CORE_PACKAGES = {"torch", "timm", "safetensors", "huggingface_hub"}
# Imported when the first kernel starts: the library runs where there is no Triton, too.
WITH_TRITON = SOURCE / "kernels" / "programs.py"
# The public names and the modules that define them.
PUBLIC = {
    "AdaptFormer": "adapt.adaptformer",
    "Adapter": "adapt.base",
    "AdapterConfig": "adapt.base",
    "AttachedDial": "model.attach",
    "Backbone": "backbones.build",
    "BitFit": "adapt.plain",
    "Cascade": "cascade.cascade",
    "CascadeCalibration": "cascade.thresholds",
    "Combined": "adapt.combined",
    "Compensator": "compensate.compensator",
    "ConvPass": "adapt.convpass",
    "DAR": "reduce.dar",
    "DARAdapter": "adapt.dar",
    "DARDecoder": "decode.dar",
    "DecoderConfig": "decode.base",
    "DenseAdapter": "adapt.dense",
    "DialViT": "model.dial_vit",
    "Difference": "model.difference",
    "DyT": "reduce.dyt",
    "DynamicViT": "reduce.dynamicvit",
    "EViT": "reduce.evit",
    "ExportedFile": "export_files",
    "ExportedViT": "runtimes.exported_vit",
    "FFNMerge": "reduce.ffn_merge",
    "FacT": "adapt.fact",
    "FitResult": "tune.fit_result",
    "FrameByFrame": "reduce.frame_by_frame",
    "FullFineTuning": "adapt.plain",
    "Grouping": "tokens",
    "Houlsby": "adapt.houlsby",
    "LastBlocks": "adapt.plain",
    "LinearDecoder": "decode.linear",
    "LinearProbe": "adapt.plain",
    "InWindows": "reduce.in_windows",
    "LearntMetric": "reduce.learnt_metric",
    "LoRA": "adapt.lora",
    "NOAH": "adapt.noah",
    "NOAHSupernet": "adapt.noah",
    "MaskTransformer": "decode.segmenter",
    "OptimizedViT": "tune.optimized_vit",
    "PEFT": "adapt.peft",
    "PYRA": "reduce.pyra",
    "PiToMe": "reduce.pitome",
    "ProxyCLIP": "open_vocabulary.proxy_clip",
    "ProxyCLIPConfig": "open_vocabulary.config",
    "PruneMerge": "reduce.prune_merge",
    "Reducer": "reduce.base",
    "ReducerConfig": "reduce.base",
    "ReleasedDenseAdapter": "adapt.dense_released",
    "ResTuning": "adapt.res_tuning",
    "Runtime": "runtimes.config",
    "SSF": "adapt.ssf",
    "Stack": "reduce.stack",
    "SynQT": "adapt.synqt",
    "ToCom": "compensate.config",
    "ToMe": "reduce.tome",
    "Tokens": "tokens",
    "UpConvDecoder": "decode.upconv",
    "VPT": "adapt.vpt",
    "ViTShape": "shape",
    "attach": "model.attach",
    "attached": "model.attach",
    "calibrate": "measure.shares",
    "checks": "checks",
    "convert_weights": "backbones.convert",
    "difference": "model.difference",
    "export": "export_files",
    "fit": "tune.fit_schedules",
    "load": "model.loading",
    "load_reference": "reference",
    "optimize": "tune.optimized_vit",
    "patches_in_boxes": "model.protect",
    "preset": "reduce.presets",
    "register": "methods",
    "video_vit": "backbones.pooling",
    "wrap": "model.wrap",
}


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}
ROOMS = sorted({name.split(".")[1] for name in MODULES})


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, wherever in it: in functions and for type checkers, too."""
    tree = ast.parse(path.read_text())
    found = set[str]()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


def packages(names: set[str]) -> set[str]:
    """Packages among imports that neither Python nor Tokendial brings."""
    found = {name.split(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"tokendial"}


def test_every_module_has_a_floor():
    assert set(ROOMS) == FLOOR.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    room = name.split(".")[1]
    for imported in imports(MODULES[name]):
        package, _, rest = imported.partition(".")
        if package == "tokendial" and rest:
            below = rest.split(".")[0]
            assert FLOOR[below] >= FLOOR[room], f"{room} imports {below}"


@pytest.mark.parametrize("floor", FLOORS, ids="-".join)
def test_no_modules_import_each_other_in_a_circle(floor):
    names = [name for name in MODULES if name.split(".")[1] in floor]
    waiting = {name: imports(MODULES[name]) & set(names) for name in names}
    while ready := [name for name, needed in waiting.items() if not needed]:
        for name in ready:
            del waiting[name]
        waiting = {name: needed - set(ready) for name, needed in waiting.items()}
    assert not waiting


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if name.split(".")[1] in CORE and MODULES[name] != WITH_TRITON],
)
def test_the_core_imports_few_packages(name):
    assert packages(imports(MODULES[name], top_level_only=True)) <= CORE_PACKAGES


def test_the_core_requires_the_packages_that_it_imports():
    required = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == CORE_PACKAGES


def test_every_other_package_belongs_to_an_extra():
    found = set().union(*(imports(path) for path in MODULES.values() if path != WITH_TRITON))
    assert packages(found) - CORE_PACKAGES <= EXTRAS.keys()
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.values():
        assert any(re.match(rf"{package}\b", line) for line in extras[extra]), package


def test_no_package_is_required_twice():
    project = tomllib.loads(PROJECT.read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [re.match(r"[\w-]+", line)[0].lower() for lines in lists for line in lines]
    required = [name for name in names if name != "tokendial"]
    assert sorted(set(required)) == sorted(required)


def in_a_new_process(code: str) -> list[str]:
    """What a program prints, line by line."""
    environment = {"PYTHONPATH": str(SOURCE.parent), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.splitlines()


def test_importing_the_library_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import tokendial; "
        "print(*set(sys.modules) - before, sep='\\n')"
    )
    assert not packages(set(in_a_new_process(code)))


def test_wrap_imports_nothing_heavy_that_timm_does_not():
    code = (
        "import sys, timm; before = set(sys.modules); import tokendial; tokendial.wrap; "
        "print(*set(sys.modules) - before, sep='\\n')"
    )
    new = {name for name in in_a_new_process(code) if packages({name})}
    # It counts multiply-accumulates; it is small.
    assert new <= {"torch.utils.flop_counter", "torch.utils.module_tracker"}


def test_help_is_printed_without_heavy_packages():
    code = (
        "import sys, tokendial.cli; sys.argv[1:] = ['--help']\n"
        "try: tokendial.cli.main()\n"
        "except SystemExit: print(*sys.modules, sep='\\n')"
    )
    loaded = {name.split(".")[0] for name in in_a_new_process(code)}
    assert "typer" in loaded
    heavy = {"accelerate", "matplotlib", "numpy", "pydantic", "timm", "torch", "torchmetrics"}
    assert not heavy & loaded


def test_the_public_names_are_those_that_are_listed():
    assert tokendial.__all__ == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_object_of_its_module(name):
    home = import_module(f"tokendial.{PUBLIC[name]}")
    found = getattr(tokendial, name)
    assert found is (home if name == PUBLIC[name] else vars(home)[name])
    assert home is found or found.__module__ == home.__name__


def test_type_checkers_see_the_public_names():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    seen = {
        alias.asname: f"{node.module.removeprefix('tokendial')}.{alias.name}".strip(".")
        for node in block.body
        for alias in node.names
    }
    homes = {name: f"{home}.{name}" for name, home in tokendial._HOMES.items()}
    assert seen == homes | {"checks": "checks"}


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tokendial' has no attribute 'nothing'"):
        tokendial.nothing  # noqa: B018


def test_asserts_only_narrow_types():
    """`python -O` leaves them out: what checks or does something else stands in a statement."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                test = ast.unparse(node.test)
                assert test.endswith(" is not None") or test.startswith("isinstance("), (path, test)
