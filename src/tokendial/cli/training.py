"""Commands that train: train, compensate, demo; and the recipes that say how."""

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import app

if TYPE_CHECKING:
    from tokendial.runs.recipe import BaseRecipe

ResultT = TypeVar("ResultT")
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Two updates, one batch of evaluation; keep nothing.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 data.root=/images.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train as a recipe says; started again, go on where the run stopped."""
    from tokendial.runs import read_recipe
    from tokendial.train import train as run_training

    read = read_recipe(recipe, overrides or [])
    if dry_run:
        from tokendial.train.fine_tuning import FineTuning

        _try_out(read, FineTuning)
        return
    to_its_end(lambda: run_training(read))


@app.command()
def compensate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 data.root=/images.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a compensator for a pre-trained model; no labels needed."""
    from tokendial.runs import CompensateRecipe, read_recipe
    from tokendial.train import compensate as run_training

    read = read_recipe(recipe, overrides or [], kind=CompensateRecipe)
    if dry_run:
        from tokendial.train.compensator_training import CompensatorTraining

        _try_out(read, CompensatorTraining)
        return
    to_its_end(lambda: run_training(read))


def _try_out(recipe: "BaseRecipe", make_job: Callable[..., object]) -> None:
    from tokendial.train.dry_run import dry_run

    seen = dry_run(recipe, make_job)
    if seen is None:
        return
    numbers = {name: value for name, value in seen.metrics.items() if isinstance(value, float)}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())
    print(f"dry run in {seen.seconds:.1f} s, nothing kept: {shown}")


def to_its_end(run: Callable[[], ResultT]) -> ResultT:
    """Train; exit code 130 if the process was asked to stop."""
    from tokendial.train import InterruptedRunError

    try:
        return run()
    except InterruptedRunError:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of a recipe: say what it is, and every field of it. Of a folder: list it."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema, for editors.")
    ] = False,
) -> None:
    """List the recipes that are shipped, or explain one."""
    from tokendial.runs.recipe_file import (
        contents,
        describe,
        find_recipe,
        recipe_schema,
        recipes_in,
        summary,
    )

    if schema:
        print(json.dumps(recipe_schema(), indent=2))
    elif name is None:
        _print_recipes(contents())
        print("tokendial recipes FOLDER/ lists the recipes of a folder.")
    elif below := recipes_in(name):
        _print_recipes({shipped: summary(file) for shipped, file in below.items()})
    else:
        for line in describe(find_recipe(name)[0]).splitlines():
            print(f"# {line}".rstrip())
        print()
        print(_every_field(name), end="")


def _every_field(name: str) -> str:
    """A recipe as YAML with the values of all its fields; what it leaves open is a comment."""
    import yaml
    from pydantic import ValidationError

    from tokendial.runs.recipe import CompensateRecipe, Recipe, check_section
    from tokendial.runs.recipe_file import apply_overrides, find_recipe, resolved_recipe

    data = resolved_recipe(name)
    data.setdefault("output", f"runs/{find_recipe(name)[1]}")
    kind = Recipe if "adapt" in data else CompensateRecipe
    try:
        kind.model_validate(data)
        left_open = []
    except ValidationError as error:
        wrong = error.errors()
        left_open = [".".join(map(str, e["loc"])) for e in wrong if e["type"] == "missing"]
    filled = apply_overrides(data, [f"{field}=_" for field in left_open])
    fields = check_section(kind, filled).model_dump(mode="json")
    for field in left_open:
        *parents, last = field.split(".")
        place = fields
        for parent in parents:
            place = place[parent]
        del place[last]
    notes = "".join(f"# {field} is left open: it has to be given.\n" for field in left_open)
    return notes + yaml.safe_dump(fields, sort_keys=False)


def _print_recipes(recipes: dict[str, str]) -> None:
    table = Table("recipe", "what it is", box=None)
    for name, said in recipes.items():
        table.add_row(name, said)
    Console().print(table)


class DemoTask(StrEnum):
    """What the demo learns."""

    counting = "counting"
    masks = "masks"


@app.command()
def demo(
    task: Annotated[
        DemoTask, typer.Option(help="counting: Sparse-Tuning and a compensator; masks: DAR.")
    ] = DemoTask.counting,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run and the report; default: demo or demo_masks."),
    ] = None,
) -> None:
    """The whole story in a few minutes, offline: fine-tune the shipped model, turn the dial."""
    from tokendial.demo import run_demo, run_masks_demo

    if task is DemoTask.masks:
        run_masks_demo(out or Path("demo_masks"))
    else:
        run_demo(out or Path("demo"))
