"""The command line itself: its groups of commands, how mistakes are told, the version."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tokendial
from tokendial.errors import error_message


class _Stopped(BaseException):
    """Ctrl-C, by a name that Typer does not know: it would end without a word."""


class _Commands(TyperGroup):
    """Commands that leave it to `main` to say why they end."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the arguments."""
        with _told():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise _Stopped from None
    except EOFError as error:  # Typer would say that the user has aborted it
        raise ValueError(str(error) or "a file ends too early.") from error


app = typer.Typer(
    cls=_Commands,
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
        try:
            app()
        finally:
            _flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.exit(1)
    # Of the system: no such folder, no permission, disk full, the hub out of reach.
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, _Stopped):
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _flush() -> None:
    """Write what has been printed, while an error can still be told in one line."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python tries again when it ends, and would complain in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """One fine-tuned Vision Transformer, run at any cost."""
    if show:
        print(f"tokendial {tokendial.__version__}")
        raise typer.Exit
