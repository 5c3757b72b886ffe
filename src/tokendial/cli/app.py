"""The command line: its groups of commands, its version, and how errors are reported."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tokendial
from tokendial.errors import error_message

TRAIN_PANEL = "Train"
USE_PANEL = "Use a trained model"
INSPECT_PANEL = "Inspect and convert"
"""Titles of the groups that `tokendial --help` lists the commands in."""


_click: Any = sys.modules[typer.BadParameter.__module__]
"""The errors of Click: of the package, or of the copy that newer versions of Typer hold."""


class _Interrupted(BaseException):
    """A Ctrl-C under a name that Typer does not handle: Typer would end without a message."""


class _Commands(TyperGroup):
    """Commands whose errors reach `main`, which reports them."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the arguments."""
        with _errors_past_typer():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _errors_past_typer():
            return super().invoke(ctx)


@contextmanager
def _errors_past_typer() -> Iterator[None]:
    """Turn the errors that Typer would handle itself into others, which it lets pass."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Interrupted from None
    except EOFError as error:  # Typer would report it as an abort by the user
        raise ValueError(str(error) or "a file ends too early.") from error
    except _click.NoArgsIsHelpError:
        raise
    except _click.UsageError as error:  # Typer would draw a box of several lines
        raise ValueError(_usage_message(error)) from None


def _usage_message(error: Any) -> str:
    """The message of a usage error: the option, its value, what is allowed, where to read on."""
    mistake: str = error.format_message().replace("Value error, ", "").rstrip(".")
    if hasattr(error.__cause__, "errors"):  # of pydantic, whose text does not name the value
        given = repr(error.__cause__.errors()[0]["input"])
        mistake += "" if given in mistake else f", got {given}"
    mistake += "" if mistake.endswith("?") else "."
    return f"{mistake} See {error.ctx.command_path} --help."


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(
    no_args_is_help=True, help="Recompute the cost tables of the papers on the real models."
)
app.add_typer(reproduce, name="reproduce", rich_help_panel=INSPECT_PANEL)
data = typer.Typer(no_args_is_help=True, help="Check folders of training images.")
app.add_typer(data, name="data", rich_help_panel=INSPECT_PANEL)
weights = typer.Typer(no_args_is_help=True, help="Fetch and convert released weight files.")
app.add_typer(weights, name="weights", rich_help_panel=INSPECT_PANEL)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr, with exit code 2."""
    try:
        try:
            app(prog_name="tokendial")
        finally:
            _flush_stdout()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        sys.exit(1)
    # OSError: no such folder, no permission, disk full, hub not reachable.
    # ModuleNotFoundError: a package of an extra is not installed.
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, _Interrupted):
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _flush_stdout() -> None:
    """Write out what was printed while `main` can still report an error of it."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes again at its end, and would print a traceback of the same error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune a Vision Transformer once, then choose how much compute each prediction uses."""
    if show:
        print(f"tokendial {tokendial.__version__}")
        raise typer.Exit
