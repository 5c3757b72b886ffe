"""The command line itself: its groups of commands, how mistakes are told, the version."""

import sys
from typing import Annotated

import typer

import tokendial
from tokendial.errors import one_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One fine-tuned Vision Transformer, run at any cost.",
)
reproduce = typer.Typer(no_args_is_help=True, help="What papers print, computed anew.")
app.add_typer(reproduce, name="reproduce")
data = typer.Typer(no_args_is_help=True, help="Folders of images.")
app.add_typer(data, name="data")
weights = typer.Typer(no_args_is_help=True, help="Released weight files.")
app.add_typer(weights, name="weights")


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    # Of the system: no such folder, no permission, disk full, the hub out of reach.
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """One fine-tuned Vision Transformer, run at any cost."""
    if show:
        print(f"tokendial {tokendial.__version__}")
        raise typer.Exit
