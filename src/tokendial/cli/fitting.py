"""The command that finds schedules of token reduction for a run: fit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import app
from tokendial.cli.using import Precision, RunFolder

if TYPE_CHECKING:
    from tokendial.tune import FitPoint, FitResult


@app.command()
def fit(
    run: RunFolder,
    speedup: Annotated[
        str | None, typer.Option(help="Over degree 0, measured here: 2, or 1.5,2,3.")
    ] = None,
    latency_ms: Annotated[str | None, typer.Option(help="Milliseconds of a batch.")] = None,
    gmacs: Annotated[str | None, typer.Option(help="Of an image; nothing is timed.")] = None,
    reduce: Annotated[
        str | None, typer.Option(help="tome or evit; default: the run's own, or tome.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of pictures; default: the run's training images.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="To draw, at most.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    minutes: Annotated[float, typer.Option(help="For everything.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of images.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model; default: RUN/fitted.")
    ] = None,
) -> None:
    """Find how many tokens each layer should remove within a budget; no training, no labels."""
    from tokendial.atomic import atomic_write
    from tokendial.runs import Run
    from tokendial.runs.fit import fit_run
    from tokendial.show.plots import fit_figure
    from tokendial.show.report import png

    given = {"speedup": speedup, "latency_ms": latency_ms, "gmacs": gmacs}
    folder, console = out or run / "fitted", Console()
    fitted = fit_run(
        Run(run),
        folder,
        {kind: _numbers(kind, text) for kind, text in given.items() if text is not None},
        reduce=reduce,
        calibration=calibration,
        images=images,
        seed=seed,
        batch_size=batch_size,
        precision=precision.value,
        minutes=minutes,
        note=lambda text: console.print(text, highlight=False),
    )
    console.print(_table(fitted))
    for warning in fitted.warnings():
        print(warning)
    with atomic_write(folder / "fit.png") as path:
        path.write_bytes(png(fit_figure(fitted, title=str(run))))
    print(f"wrote {folder}: tokendial eval {folder} --degrees all")


def _numbers(kind: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{kind} must look like 2 or 1.5,2,3, got {text!r}.") from None


def _table(fitted: "FitResult") -> Table:
    """Each degree beside the constant schedule that costs no more."""
    table = Table(
        "degree", "removed per layer", fitted.unit, "speed-up", "divergence", "same answer"
    )
    table.add_row("0", "nothing", f"{fitted.unreduced:.4g}", "1.00", "0", "100.0%")
    for degree in fitted.degrees:
        removed = " ".join(map(str, degree.found.removed))
        table.add_row(str(degree.degree), removed, *_cells(fitted, degree.found))
        if degree.constant:
            constant = f"constant {degree.constant.removed[0]}"
            table.add_row("", constant, *_cells(fitted, degree.constant))
    return table


def _cells(fitted: "FitResult", point: "FitPoint") -> tuple[str, ...]:
    return (
        f"{fitted.unreduced * point.cost:.4g}",
        f"{point.speedup:.2f}",
        f"{point.divergence:.4f}",
        f"{point.top1:.1%}",
    )
