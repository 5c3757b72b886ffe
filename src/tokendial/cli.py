"""The command line: `tokendial COMMAND`. Each command parses, calls the library, and reports."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import tokendial

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One fine-tuned Vision Transformer, run at any cost.",
)
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as train.epochs=10 data.root=/images")
]


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2."""
    from tokendial.train.loop import Interrupted

    try:
        app()
    except ValueError as error:
        # A message from a loader's process comes wrapped in a traceback; its last line is ours.
        line = str(error).strip().splitlines()[-1]
        print(f"error: {line.removeprefix('tokendial.data.images.ImageError: ')}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """One fine-tuned Vision Transformer, run at any cost."""
    if show:
        print(f"tokendial {tokendial.__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
) -> None:
    """Train as a recipe says; started again, go on where the run stopped."""
    from tokendial.train import read_recipe
    from tokendial.train import train as run_training

    run = run_training(read_recipe(recipe, overrides or []))
    print(f"best model: {run.best}")


if __name__ == "__main__":
    main()
