"""Commands that train many runs: sweep, vtab."""

from typing import Annotated

import typer

from tokendial.cli.app import TRAIN_PANEL, app
from tokendial.cli.options import Overrides, RecipeName
from tokendial.cli.training import run_until_stopped

Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Runs to train at the same time (default: the number of GPUs, at least 1)."
    ),
]


@app.command(rich_help_panel=TRAIN_PANEL)
def sweep(
    recipe: RecipeName,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUES",
            help="A field and its values, such as seed=0,1,2. Repeat for more fields.",
        ),
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Train a recipe at every combination of some settings.

    Writes one run per combination and tables of all results. Finished runs are not trained again.
    Exit code 1 if a run failed.
    """
    from tokendial.sweeps import sweep as run_sweep

    if not over:
        raise ValueError("over: what is to be swept is missing, such as --over seed=0,1,2.")
    result = run_until_stopped(lambda: run_sweep(recipe, overrides or [], over=over, jobs=jobs))
    print()
    print("\n".join(table.markdown() for table in result.tables()))
    if result.errors:
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN_PANEL)
def vtab(
    recipe: RecipeName,
    root: Annotated[
        str,
        typer.Argument(metavar="ROOT", help="Folder that holds the folders of VTAB-1k's tasks."),
    ],
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUES",
            help="A field to choose for each task, and its values, such as adapt.scale=0.1,1. The "
            "choice is made on 800 training and 200 validation images. Repeat for more fields.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to train, such as cifar,dtd (default: all 19).")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of the final runs, such as 0,1,2 (default: the recipe's seed)."),
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Train a recipe on the tasks of VTAB-1k, by the protocol that papers use.

    Each final run trains on 1,000 images and is tested once. Writes tables with the means beside
    those of papers. Finished runs are not trained again. Exit code 1 if a run failed.
    """
    from tokendial.data import VTAB_TASKS
    from tokendial.sweeps import vtab as run_vtab

    if seeds is not None and not all(seed.isdecimal() for seed in seeds.split(",")):
        raise ValueError(f"seeds must look like 0,1,2, got {seeds!r}.")
    result = run_until_stopped(
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
