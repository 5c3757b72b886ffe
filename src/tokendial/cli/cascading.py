"""The command that lets a cheap degree answer, and a better one where it is unsure: cascade."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.evaluation_output import write_picture
from tokendial.cli.options import (
    PrecisionOption,
    RunFolder,
    RuntimeOption,
    runtime_for,
    runtime_of,
)

if TYPE_CHECKING:
    from tokendial.runs.cascade import CascadeReport


@app.command(rich_help_panel=USE_PANEL)
def cascade(
    run: RunFolder,
    degrees: Annotated[
        str,
        typer.Option(
            help="Two or three degrees, the cheapest first, such as 8,0. The last one answers for "
            "images that the others are unsure of."
        ),
    ],
    max_changed: Annotated[
        float | None,
        typer.Option(
            help="Largest share of images whose answer may differ from that of the last degree, "
            "such as 0.01."
        ),
    ] = None,
    max_lost: Annotated[
        float | None,
        typer.Option(
            help="Instead: largest share of images whose answer may be wrong where that of the "
            "last degree is right."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Probability with which the promise is to hold.")
    ] = 0.95,
    score: Annotated[
        Literal["margin", "probability", "entropy"],
        typer.Option(help="How sure the model is: margin of the two likeliest classes, ..."),
    ] = "margin",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    runtime: RuntimeOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Let a cheap degree answer, and a better one for the images that it is unsure of.

    Finds on the validation images how sure the cheap degree must be, so that the share of worse
    answers stays below a bound. Prints what it costs beside fixed degrees, with a plot, and writes
    the result to RUN/cascade.json, which `tokendial predict` and `tokendial serve` use with
    --cascade.
    """
    from tokendial.runs import Run
    from tokendial.runs.cascade import calibrate_cascade
    from tokendial.runs.degrees import parse_degrees
    from tokendial.runs.progress import progress_bar
    from tokendial.show.cascade import cascade_figure

    opened, console = Run(run), Console(stderr=True)
    with progress_bar(console) as shown:
        report = calibrate_cascade(
            opened,
            parse_degrees(degrees, opened.model().degrees),
            max_changed=max_changed,
            max_lost=max_lost,
            confidence=confidence,
            score=score,
            batch_size=batch_size,
            runtime=runtime_for(run, runtime_of(runtime, precision)),
            progress=shown.update,
        )
    Console().print(_table(report))
    for line in _lines(report):
        print(line)
    plot = run / "eval" / "cascade.png"
    write_picture(cascade_figure(report, title=str(run)), plot)
    print(f"wrote {plot}")
    options = f" --runtime {runtime}" if runtime else ""
    options += f" --precision {precision}" if precision else ""
    masks = "" if report.measure == "accuracy" else " --out MASKS"
    print(f"wrote {opened.cascade_file}: tokendial predict {run} IMAGES{masks} --cascade{options}")


def _table(report: "CascadeReport") -> Table:
    title = "right (%)" if report.measure == "accuracy" else f"{report.measure} (%)"
    table = Table("", title, "minus last degree", "GMACs", "ms", "p50", "p99")
    for row in report.rows:
        middle, high = row.percentiles_ms
        table.add_row(
            row.name,
            row.accuracy.percent(),
            row.minus_last.percent(sign=True),
            f"{row.gmacs:.4g}",
            *(f"{value:.2f}" for value in (row.mean_ms, middle, high)),
        )
    return table


def _lines(report: "CascadeReport") -> list[str]:
    """The calibration, and the comparisons, in words."""
    found = report.calibration
    sent = ", then ".join(
        f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        for share, (low, high) in zip(found.sent_on, found.sent_on_range, strict=True)
    )
    thresholds = ", ".join(f"{value:.3g}" for value in found.thresholds)
    what = "other answers" if found.harm == "changed" else "lost answers"
    minus_fixed, minus_random = (
        interval.percent(sign=True) for interval in (report.minus_fixed, report.minus_random)
    )
    lines = [
        f"{what}: {found.harmed} of {found.images}; with {found.confidence:.0%} confidence at most "
        f"{100 * found.bound:.2f} % (allowed {100 * found.allowed:g} %)",
        f"sent on: {sent} of the images; answered early from {thresholds} on",
        f"{report.measure} minus fixed degrees at the same time: {minus_fixed}",
        f"{report.measure} minus sending on at random: {minus_random}",
        "The promise holds for images like these. Another share sent on means other images.",
    ]
    if found.sent_on[0] == 1.0:
        lines.append(
            f"No image is answered early, so this cascade only costs time: start at a degree below "
            f"{report.degrees.partition('→')[0]}, or allow more."
        )
    return lines
