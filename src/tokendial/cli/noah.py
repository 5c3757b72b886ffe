"""The command that searches the best subnet of NOAH's supernet: noah."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import TRAIN_PANEL, app
from tokendial.cli.options import RunFolder

if TYPE_CHECKING:
    from tokendial.adapt.noah import Widths


@app.command(rich_help_panel=TRAIN_PANEL)
def noah(
    run: RunFolder,
    max_parameters: Annotated[
        str,
        typer.Option(
            help="How many parameters the subnet may have at most, without the head: 640000, 640k "
            "or 0.64M."
        ),
    ],
    population: Annotated[int, typer.Option(help="Number of subnets that each round adds.")] = 50,
    parents: Annotated[
        int, typer.Option(help="Number of best subnets that are changed and combined.")
    ] = 10,
    mutations: Annotated[
        int, typer.Option(help="Number of subnets of a round that change one parent.")
    ] = 25,
    crossovers: Annotated[
        int, typer.Option(help="Number of subnets of a round that combine two parents.")
    ] = 25,
    mutation_probability: Annotated[
        float,
        typer.Option(
            help="Probability that a mutation changes prompts, LoRA or adapters, each for itself."
        ),
    ] = 0.2,
    depth_probability: Annotated[
        float,
        typer.Option(help="Probability that such a change draws a new number of blocks."),
    ] = 0.4,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the recipe of the subnet (default: RUN/subnet.yaml)."),
    ] = None,
) -> None:
    """Search the best widths of prompts, LoRA and adapters in a run of NOAH's supernet.

    Subnets are compared on the validation images. Writes a recipe that trains the best one anew.
    The same command continues a search that was stopped.
    """
    from tokendial.runs import Run
    from tokendial.runs.noah import search_subnet
    from tokendial.tasks.metric_titles import metric_title
    from tokendial.tune.subnet_search import Evolution

    console = Console(stderr=True)
    found = search_subnet(
        Run(run),
        _number(max_parameters),
        evolution=Evolution(
            population=population,
            parents=parents,
            mutations=mutations,
            crossovers=crossovers,
            mutation_probability=mutation_probability,
            depth_probability=depth_probability,
            rounds=rounds,
            seed=seed,
        ),
        out=out,
        batch_size=batch_size,
        note=lambda text: console.print(text, highlight=False),
    )
    Console().print(_table(found.widths))
    print(
        f"best of {found.judged} subnets: {metric_title(found.metric)} {found.score:.2%}, "
        f"{found.parameters:,} parameters"
    )
    recipe = out or run / "subnet.yaml"
    print(f"wrote {recipe}: tokendial train {recipe}")


def _number(text: str) -> int:
    """Read a number such as 640000, 640k or 0.64M."""
    if not (found := re.fullmatch(r"(\d+\.?\d*)([kM]?)", text)):
        raise ValueError(f"max_parameters must look like 640000, 640k or 0.64M, got {text!r}.")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]])


def _table(widths: "Widths") -> Table:
    """The widths, one column for each block."""
    table = Table("block", *map(str, range(1, len(widths.prompts) + 1)))
    for title, numbers in zip(("prompts", "rank of LoRA", "adapter"), widths, strict=True):
        table.add_row(title, *map(str, numbers))
    return table
