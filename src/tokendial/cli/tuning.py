"""The command that finds the fastest way to run a model within a loss: tune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.options import RunFolder

if TYPE_CHECKING:
    from tokendial.runs.tuning import TunedRun


@app.command(rich_help_panel=USE_PANEL)
def tune(
    run: RunFolder,
    max_loss: Annotated[
        float,
        typer.Option(help="How many points of the main metric, and of the accuracy, may be lost."),
    ] = 1.0,
    speedup: Annotated[
        float,
        typer.Option(
            help="How many times as fast as degree 0 in PyTorch and float32 it has to be at least."
        ),
    ] = 1.0,
    compensator: Annotated[
        str | None, typer.Option(help="Folder of a compensator to try, too (default: none).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    minutes: Annotated[float, typer.Option(help="Time after which nothing new is started.")] = 15.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tuned model (default: RUN/tuned).")
    ] = None,
) -> None:
    """Find the fastest way to run a model on this machine's CPU within a loss.

    Tries fitted schedules, the installed runtimes in each precision, a compensator if one is given,
    and cascades on the validation images, and writes the best of them as a run. Exit code 1 if
    nothing reaches what is asked for.
    """
    from tokendial.runs import Run
    from tokendial.runs.tuning import tune_run

    console = Console(stderr=True)
    found = tune_run(
        Run(run),
        speedup=speedup,
        max_loss=max_loss / 100,
        out=out,
        compensator=compensator,
        batch_size=batch_size,
        minutes=minutes,
        note=lambda text: console.print(text, highlight=False),
    )
    Console().print(_table(found))
    for note in found.notes:
        print(f"left out: {note}")
    if found.best is None:
        print(
            f"nothing that was tried is {speedup:g} times as fast and loses at most "
            f"{max_loss:g} points; nothing was written."
        )
        raise typer.Exit(1)
    folder = out or run / "tuned"
    way = found.best.way
    words = ["--cascade"] if len(way.degrees) > 1 else []
    if way.schedule == "compensated":
        words += [f"--degree {way.degrees[0]} --compensator {compensator}"]
    print(f"wrote {folder}: tokendial predict {folder} IMAGES", *words)


def _table(found: "TunedRun") -> Table:
    from tokendial.tasks.metric_titles import metric_title

    title = metric_title(found.metric)
    table = Table("", "speed-up", title, "points lost", "accuracy lost (95 %)")
    table.add_row("torch fp32, degree 0", "1.00x", f"{found.base_score:.2%}", "", "")
    for row in found.rows:
        interval = row.accuracy_lost
        table.add_row(
            str(row.way) + " (chosen)" * (row is found.best),
            f"{row.speedup:.2f}x",
            f"{row.score:.2%}",
            f"{100 * row.lost:+.1f}",
            interval.percent(sign=True) if interval else "",
        )
    return table
