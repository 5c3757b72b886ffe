"""Commands that train many runs: sweep, vtab."""

from typing import Annotated

import typer

from tokendial.cli.app import app
from tokendial.cli.training import to_its_end

Over = Annotated[
    list[str] | None,
    typer.Option(help="What is swept, such as seed=0,1,2; once for each field."),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Runs side by side; default: as many as there are GPUs, or 1."),
]


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 data.root=/images.")
    ] = None,
    over: Over = None,
    jobs: Jobs = None,
) -> None:
    """Train a recipe at every combination of some settings; exit code 1 if a run failed."""
    from tokendial.sweeps import sweep as run_sweep

    if not over:
        raise ValueError("over: what is to be swept is missing, such as --over seed=0,1,2.")
    result = to_its_end(lambda: run_sweep(recipe, overrides or [], over=over, jobs=jobs))
    print()
    print("\n".join(table.markdown() for table in result.tables()))
    if result.errors:
        raise typer.Exit(1)


@app.command()
def vtab(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    root: Annotated[str, typer.Argument(help="Folder that holds the folders of the tasks.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 train.precision=bf16.")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(help="What is chosen for each task on 800 + 200 images: adapt.scale=0.1,1."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Such as cifar,dtd; default: all 19.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Of the final runs, such as 0,1,2; default: the recipe's.")
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Train on VTAB-1k's tasks, test once, and print the table; exit code 1 if a run failed."""
    from tokendial.data import VTAB_TASKS
    from tokendial.sweeps import vtab as run_vtab

    if seeds is not None and not all(seed.isdecimal() for seed in seeds.split(",")):
        raise ValueError(f"seeds must look like 0,1,2, got {seeds!r}.")
    result = to_its_end(
        lambda: run_vtab(
            recipe,
            root,
            overrides or [],
            over=over or [],
            tasks=tasks.split(",") if tasks else tuple(VTAB_TASKS),
            seeds=[int(seed) for seed in seeds.split(",")] if seeds else None,
            jobs=jobs,
        )
    )
    print()
    print("\n".join(table.markdown() for table in result.tables()))
    if result.failed:
        raise typer.Exit(1)
