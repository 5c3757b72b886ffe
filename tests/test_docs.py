"""Code blocks of README.md and docs/ are run, parsed and type-checked; links lead somewhere.

Python blocks run page by page, in one namespace, in an empty folder. A comment behind `print(...)`
is compared with what is printed: it has to begin with it. What the tests put in place of what a
reader has:

- Pretrained weights cannot be downloaded here: `timm.create_model(..., pretrained=True)` gives the
  same architecture with random weights, and `transformers.pipeline` a depth model of the same size.
  Names, arguments, shapes and costs are tested all the same; accuracies are not.
- `td.fit` by time measures for minutes: its arguments are checked, and a tiny model is fitted by
  counted costs instead. A sweep trains a tiny model for one epoch.
- Pages of methods ask for costs only: their models lie on the meta device.
- Names that a page takes for granted (`model`, `images`, ...), and folders such as runs/pets, are
  made ready by `prepared`.

Commands are parsed by the real command line (every command, option and value has to exist), recipes
and their dotted fields are read by the real reader; other programs are known by name.
"""

import ast
import contextlib
import copy
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import typer
import yaml
from markdown_pages import PAGES, ROOT, Block, anchors_of, blocks_of, links_of
from whole_models import depth_anything_small

import tokendial as td
import tokendial.sweeps
from benchmarks.__main__ import COMMANDS
from tokendial.cli import app
from tokendial.runs import CompensateRecipe, read_recipe

pytestmark = pytest.mark.slow

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# These have tests of their own.
RUN_ELSEWHERE = {
    "docs/add-a-method.md": "test_docs.py",
    "docs/tutorials/first-model.md": "test_docs.py",
    "docs/examples.md": "test_examples.py",
    "docs/export.md": "test_export*.py",
}
# What a page takes for granted, for the type checker and (by `prepared`) for running it.
DECLARED = {"docs/fit.md": "vit: nn.Module\nmodel: td.DialViT\nimages: Tensor\n"}
PROGRAMS = {
    *("accelerate", "apt-get", "cd", "curl", "kill", "make", "pip", "pre-commit", "pytest"),
    *("python", "serve", "tokendial", "git"),
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_pages() -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.language == "python":
            found.setdefault(name_of(block.page), []).append(block)
    return found


# Python


def without_downloads(create_model: Any) -> Any:
    """`timm.create_model` with random weights, each model drawn once."""
    made: dict[str, Any] = {}

    def create(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        key = f"{name} {sorted(arguments.items())} {torch.get_default_device()}"
        if key not in made:
            torch.manual_seed(0)
            made[key] = create_model(name, pretrained=False, **arguments)
        return copy.deepcopy(made[key])

    return create


def offline_pipeline(task: str, model: str) -> Any:
    """`transformers.pipeline` for the one model that pages name, with random weights."""
    assert (task, model) == ("depth-estimation", "depth-anything/Depth-Anything-V2-Small-hf")
    processor = transformers.DPTImageProcessor(size={"height": 518, "width": 518})
    return transformers.DepthEstimationPipeline(
        model=depth_anything_small().eval(), image_processor=processor, device="cpu"
    )


def quick_fit(fit: Any) -> Any:
    """`td.fit` of a tiny model in a second, by counted costs, whatever a page asks for."""

    def run(*arguments: Any, **options: Any) -> Any:
        inspect.signature(fit).bind(*arguments, **options)
        speedups = options.get("speedup", 1.5)
        some = speedups if isinstance(speedups, tuple) else (speedups,)
        model = td.wrap(tiny())
        budgets = tuple(model.cost().gmacs / (1 + 0.3 * (each - 1)) for each in some)
        return fit(model, torch.randn(8, 3, 32, 32), gmacs=budgets, minutes=0.02)

    return run


def quick_sweep(sweep: Any) -> Any:
    """`sweep` of a tiny model for one epoch, whatever the recipe says."""
    tiny_vit = "{patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2}"
    model = f"model={{name: vit_tiny_patch16_224, weights: null, img_size: 32, args: {tiny_vit}}}"
    quick = (model, "reduce=null", "adapt={name: linear}", "augment={crop: false}")
    once = ("train={epochs: 1, batch_size: 80, trackers: []}",)

    def run(recipe: str, overrides: Any = (), **options: Any) -> Any:
        return sweep(recipe, [*overrides, *quick, *once], jobs=1, quiet=True, **options)

    return run


def tiny(**arguments: Any) -> Any:
    args = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **args | arguments)


def prepared(page: str) -> dict[str, Any]:
    """Names that a page takes for granted."""
    if page == "docs/fit.md":
        vit = tiny()
        return {"td": td, "vit": vit, "model": td.wrap(vit), "images": torch.randn(8, 3, 32, 32)}
    return {}


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block statement by statement; compare what is printed with the comment behind it."""
    padding = "\n" * (block.line - 1)
    tree = ast.parse(padding + block.code)
    lines = (padding + block.code).splitlines()
    for statement in tree.body:
        code = compile(ast.Module([statement], []), str(block.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        promised = re.search(r"print\(.*\)  # (.*)$", lines[(statement.end_lineno or 1) - 1])
        if promised:
            said = " ".join(printed.getvalue().split())
            assert promised[1].startswith(said), f"{block}: prints {said!r}, not {promised[1]!r}"


@pytest.fixture(scope="module")
def create_model() -> Any:
    return without_downloads(timm.create_model)


@pytest.mark.parametrize("page", sorted(python_pages().keys() - RUN_ELSEWHERE.keys()))
# Pages use what warns in other libraries.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_python_of_a_page_runs(page, create_model, run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", create_model)
    # When `pipeline` is first used, transformers puts another module into its own place.
    assert callable(transformers.pipeline)
    monkeypatch.setattr(sys.modules["transformers"], "pipeline", offline_pipeline)
    monkeypatch.setattr(td, "fit", quick_fit(td.fit))
    monkeypatch.setattr(tokendial.sweeps, "sweep", quick_sweep(tokendial.sweeps.sweep))
    Path("runs").mkdir()
    Path("runs/pets").symlink_to(run.folder)
    Path("pets").symlink_to(digits)
    torch.manual_seed(0)
    namespace = prepared(page)
    # Only costs are asked of the models on these pages; there they take no memory and no time.
    with torch.device("meta" if page.startswith("docs/methods/") else "cpu"):
        for block in python_pages()[page]:
            run_block(block, namespace)


def test_the_first_tutorial_works_from_its_first_line_to_its_last(cli, tmp_path, monkeypatch):
    """Its programs, its recipe and its commands, up to the part about one's own images."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "tutorials" / "first-model.md"
    end = page.read_text().split("## Your own images")[0].count("\n")
    ran = []
    for block in blocks_of(page):
        if block.line > end:
            break
        if block.language == "python":
            run_block(block, {})
        elif block.language == "yaml":
            Path("items.yaml").write_text(block.code)
        else:
            for line in block.code.splitlines():
                code, out, err = cli(*words_of(line)[1:])
                assert code == 0, err
                ran.append(out)
    assert len(ran) == 5
    assert Path("tokens.png").is_file()


def test_pages_that_run_elsewhere_are_named_there():
    for page, test in RUN_ELSEWHERE.items():
        (file,) = (ROOT / "tests").glob(test)
        assert Path(page).stem in file.read_text()


def test_the_method_of_the_guide_passes_its_test(tmp_path):
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    files = re.findall(r"```python\n# (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [name for name, _ in files] == ["norm_keep.py", "test_norm_keep.py"]
    for name, code in files:
        (tmp_path / name).write_text(code)
        assert len(code.splitlines()) < 100
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_python_of_all_pages_has_right_types(tmp_path):
    """A misspelt name, argument or attribute of an import fails here, on code that never runs too.

    The cache is that of `make lint`, which would otherwise take the time that this one takes.
    """
    folder = tmp_path / "snippets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for page, blocks in python_pages().items():
        if page == "docs/examples.md":  # it includes the examples, which follow below
            continue
        if page == "docs/add-a-method.md":  # two files
            parts = {re.match(r"# (\w+)\.py", b.code)[1]: [b] for b in blocks}  # type: ignore[index]
        else:
            parts = {re.sub(r"\W", "_", page.removesuffix(".md")): blocks}
        for name, some in parts.items():
            code = "".join(f"# {block}\n{block.code}" for block in some)
            if declared := DECLARED.get(page):
                imports = "import tokendial as td\nfrom torch import Tensor, nn\n"
                code = imports + declared + code
            # The guide's test finds the method beside it.
            code = code.replace("from norm_keep", "from snippets.norm_keep")
            (folder / f"{name}.py").write_text(code)
    for example in (ROOT / "examples").glob("*.py"):
        (folder / f"example_{example.name}").write_text(example.read_text())
    files = sorted(map(str, folder.glob("*.py")))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *files]
    environment = os.environ | {"MYPYPATH": f"{ROOT / 'src'}:{tmp_path}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Commands


def commands() -> list[tuple[Block, str]]:
    """Commands of all blocks of a shell; other indented blocks are drawings, trees or output."""
    found = []
    for block in BLOCKS:
        text = re.sub(r"\\\n\s*", " ", block.code)
        lines = [line for line in text.splitlines() if line.strip() and line[0] not in " #"]
        shell = block.language in ("bash", "sh", "console", "shell")
        if shell or (not block.language and lines and program_of(lines[0]) in PROGRAMS):
            found += [(block, line) for line in lines]
    return found


def words_of(line: str) -> list[str]:
    """Words of a command, without comment and without settings of the environment."""
    words = shlex.split(line.replace("\u2026", ""), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def program_of(line: str) -> str:
    try:
        return Path((words_of(line) or [""])[0]).name
    except ValueError:  # a drawing with a quotation mark
        return ""


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of a command of Tokendial and its options, by the command line itself."""
    command: Any = typer.main.get_command(app)
    word, name, context = "tokendial", [], None
    while True:
        context = command.make_context(word, list(words), parent=context)
        if not hasattr(command, "commands"):
            return " ".join(name), context.params
        words = [*context._protected_args, *context.args]
        word, command, words = command.resolve_command(context, words)
        name.append(word)


def check_recipe_words(name: str, options: dict[str, Any]) -> None:
    """Recipes of a command exist and have the fields that it sets."""
    if name not in ("train", "compensate", "sweep", "vtab") or "recipe" not in options:
        return
    recipe, overrides = options["recipe"], list(options.get("overrides") or ())
    if recipe.isupper() or recipe.endswith(".yaml"):
        return
    # The data set `stamps` has no root: its files are where Debian installs them.
    complete = ("data.root", "data.name=stamps")
    if name == "train" and not any(each.startswith(complete) for each in overrides):
        overrides.append("data.root=.")
    if name == "compensate":
        read_recipe(recipe, overrides, kind=CompensateRecipe)
    else:
        read_recipe(recipe, overrides)


@pytest.mark.parametrize(("block", "line"), commands(), ids=str)
def test_a_command_exists_with_its_options(block, line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = words_of(line)
    if not words:
        return
    program, words = Path(words[0]).name, words[1:]
    assert program in PROGRAMS, f"{block}: {program} is not a program that the tests know"
    if program in ("accelerate", "python") and "tokendial.cli" in words:
        program, words = "tokendial", words[words.index("tokendial.cli") + 1 :]
    if program == "tokendial" and words:
        name, options = parse([word for word in words if word not in ("&", ">", "classes.csv")])
        check_recipe_words(name, options)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets), str(block)
    elif program == "python" and words[:2] == ["-m", "benchmarks"]:
        assert words[2] in {*COMMANDS, "COMMAND"}, str(block)
    elif program == "python" and words and words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), str(block)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = extras["optional-dependencies"].keys()
        for named in re.findall(r"tokendial\[([\w,]+)\]", line):
            assert set(named.split(",")) <= known, str(block)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml_is_read(block, tmp_path, monkeypatch):
    data = yaml.safe_load(block.code)
    if data.keys() & {"adapt", "base", "model"}:  # a recipe
        file = tmp_path / "recipe.yaml"
        file.write_text(block.code)
        kind = CompensateRecipe if "compensate" in data else None
        read_recipe(file, kind=kind) if kind else read_recipe(file)


def test_blocks_are_of_known_kinds():
    kinds = {"", "bash", "json", "python", "text", "yaml"}
    assert not [str(block) for block in BLOCKS if block.language not in kinds]


# Links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link


def test_the_five_questions_are_one_click_away():
    """From README and the site's first page, to a page of its own for each."""
    questions = ("1.5 times faster", "500 labelled images", "masks", "50 ms", "own reduction")
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        lines = [line for line in page.read_text().splitlines() if line.startswith("- [")]
        for question in questions:
            assert any(question in line for line in lines), (page, question)


# The site


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("index.html", "methods/tome/index.html", "reference/model/index.html"):
        html = (tmp_path / name).read_text()
        assert not re.findall(r"<(?:script|img|link rel=.stylesheet)[^>]*=\"?https?://", html)
    assert "keep_rate" in (tmp_path / "methods/evit/index.html").read_text()  # from docstrings
    assert "time_in_rounds" in (tmp_path / "examples/index.html").read_text()  # from its file
