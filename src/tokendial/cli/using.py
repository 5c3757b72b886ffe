"""Commands that use a finished run: eval, predict, show, export."""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import app

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokendial.runs.evaluate import DegreeRow
    from tokendial.runs.evaluate_compensator import CompensatedRow
    from tokendial.tune import SpeedSettings

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Degree = Annotated[
    int | None, typer.Option(help="Degree of the dial; default: the one that was trained.")
]
Degrees = Annotated[
    str,
    typer.Option(
        help="Such as 0,4,8 or 0..16 or 0..16:4. all: every degree, or about ten by cost of a long "
        "dial. every: every one."
    ),
]


Optimize = Annotated[
    bool, typer.Option("--optimize", help="First find the fastest way to run on this machine.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="The same, and compile: a minute or so for each degree.")
]


class Precision(StrEnum):
    """Arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Faster = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Arithmetic. Half precision (where there are instructions for it) implies --optimize.",
    ),
]

_SHOWN_SCORES = 3
_SHOWN_CLASSES = 20


class Format(StrEnum):
    """Formats of predictions."""

    csv = "csv"
    jsonl = "jsonl"


@app.command("eval")
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run; several to bridge.")
    ],
    degrees: Degrees = "all",
    compensator: Annotated[
        str | None, typer.Option(help="Folder of a compensator: also run with it.")
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(help="Degree that each run was trained at, such as 0,8,16; default: its own."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    optimize: Optimize = False,
    compile: Compile = False,
    precision: Faster = Precision.fp32,
) -> None:
    """Accuracy, cost and speed of a run along the dial: table, CSV and plot."""
    speed = speed_of(optimize, compile, precision)
    if compensator is not None:
        if speed:
            raise ValueError("optimize, compile and precision do not go with --compensator.")
        _evaluate_bridged(runs, degrees, compensator, sources, batch_size)
        return
    if len(runs) > 1 or sources is not None:
        raise ValueError("several runs and sources go with --compensator only.")
    (run,) = runs
    from tokendial.runs import Run
    from tokendial.runs.evaluate import evaluate as run_evaluation
    from tokendial.runs.evaluation_tables import write_classes
    from tokendial.runs.progress import progress_bar
    from tokendial.show.confusion import confusion_figure
    from tokendial.show.plots import dial_figure

    opened, console = Run(run), Console(stderr=True)
    with progress_bar(console) as shown:
        rows = run_evaluation(
            opened, degrees, batch_size=batch_size, speed=speed, progress=shown.update
        )
    unit = "clip" if opened.on_videos() else "image"
    Console().print(_dial_table(rows, unit))
    _warn_if_disturbed(rows)
    stem = run / "eval" / "degrees"
    _write_evaluation(rows, dial_figure(rows, title=str(run), unit=unit), stem)
    matrices = [(row.degree, row.confusion.numpy()) for row in rows if row.confusion is not None]
    if matrices:
        classes = opened.classes()
        Console().print(_class_table(rows, classes))
        ends = [matrices[0], matrices[-1]] if len(matrices) > 1 else matrices
        table, picture = stem.with_name("classes.csv"), stem.with_name("confusion.png")
        write_classes(rows, classes, table)
        _write_picture(confusion_figure(ends, classes, title=str(run)), picture)
        print(f"wrote {table} and {picture}")


def _dial_table(rows: "Sequence[DegreeRow]", unit: str) -> Table:
    """Scores, cost and speed at each degree."""
    # Of many metrics (each class has one of its own) the first tell enough; the CSV has all.
    shown = list(rows[0].scores)[:_SHOWN_SCORES]
    names = [name.replace("_", " ") for name in shown]
    # Where tokens are chosen by their values, every one leaves the last layer.
    last = "tokens left" if rows[0].share is None else "tokens processed"
    table = Table("degree", *names, "GMACs", "cost", f"{unit}s/s", "speed", last)
    for row in rows:
        table.add_row(
            str(row.degree),
            *(f"{row.scores[name]:.2%}" for name in shown),
            f"{row.gmacs:.4g}",
            f"{row.gmacs / rows[0].gmacs:.0%}",
            f"{row.images_per_s:.1f}" if row.images_per_s < 10 else f"{row.images_per_s:.0f}",
            f"{row.speedup:.2f}x" + " ?" * row.disturbed,
            str(row.tokens) if row.share is None else f"{row.share:.1%}",
        )
    return table


def _class_table(rows: "Sequence[DegreeRow]", classes: Sequence[str]) -> Table:
    """The classes that are recognised worst at the first degree, beside the last one."""
    from tokendial.runs.evaluation_tables import class_scores

    first, last = class_scores(rows[0], classes), class_scores(rows[-1], classes)
    several = len(rows) > 1
    table = Table(
        "class",
        "images",
        f"recall at {rows[0].degree}",
        *[f"at {rows[-1].degree}"] * several,
        f"precision at {rows[0].degree}",
        *[f"at {rows[-1].degree}"] * several,
        "most often taken for",
        title=f"the {_SHOWN_CLASSES} classes of lowest recall" * (len(classes) > _SHOWN_CLASSES),
    )
    worst = sorted(zip(first, last, strict=True), key=lambda pair: pair[0].recall)
    for at_first, at_last in worst[:_SHOWN_CLASSES]:
        table.add_row(
            at_first.name,
            str(at_first.images),
            _percent(at_first.recall),
            *[_percent(at_last.recall)] * several,
            _percent(at_first.precision),
            *[_percent(at_last.precision)] * several,
            f"{at_first.mistaken_for} ({at_first.times})" if at_first.mistaken_for else "",
        )
    return table


def _percent(share: float) -> str:
    """Nothing where there were no images to take a share of."""
    return "" if math.isnan(share) else f"{share:.1%}"


def _warn_if_disturbed(rows: "Sequence[DegreeRow] | Sequence[CompensatedRow]") -> None:
    if any(row.disturbed for row in rows):
        print("speed: times differed widely, so something else used this machine: measure again")


def speed_of(optimize: bool, compile: bool, precision: Precision) -> "SpeedSettings":
    """What the options ask for."""
    from tokendial.tune import SpeedSettings

    return SpeedSettings(optimize, compile, precision.value)


def _evaluate_bridged(
    folders: list[Path], degrees: str, compensator: str, sources: str | None, batch_size: int
) -> None:
    from tokendial.compensate import Compensator
    from tokendial.runs import Run
    from tokendial.runs.degrees import parse_degrees
    from tokendial.runs.evaluate_compensator import evaluate_compensator
    from tokendial.runs.progress import progress_bar
    from tokendial.show.plots import bridged_figure

    plugin = Compensator.from_pretrained(compensator)
    offered = tuple(range(plugin.steps + 1))
    with progress_bar(Console(stderr=True)) as shown:
        rows = evaluate_compensator(
            [Run(folder) for folder in folders],
            plugin,
            degrees,
            sources=parse_degrees(sources, offered) if sources else None,
            batch_size=batch_size,
            progress=shown.update,
        )
    table = Table("trained at", "run at", "plain", "compensated", "gain", "GMACs", "images/s")
    for row in rows:
        table.add_row(
            str(row.source),
            str(row.degree),
            f"{row.plain:.2%}",
            f"{row.accuracy:.2%}",
            f"{100 * (row.accuracy - row.plain):+.2f}",
            f"{row.gmacs:.4f}",
            f"{row.images_per_s:.0f}" + " ?" * row.disturbed,
        )
    Console().print(table)
    _warn_if_disturbed(rows)
    figure = bridged_figure(rows, title=f"scale {plugin.scale:g}")
    _write_evaluation(rows, figure, folders[0] / "eval" / "bridged")


def _write_evaluation(
    rows: "Sequence[DegreeRow] | Sequence[CompensatedRow]", figure: "Figure", stem: Path
) -> None:
    """Write the rows as CSV and their figure as PNG, and say where."""
    from tokendial.runs.evaluation_tables import write_rows

    table, plot = stem.with_suffix(".csv"), stem.with_suffix(".png")
    write_rows(rows, table)
    _write_picture(figure, plot)
    print(f"wrote {table} and {plot}")


def _write_picture(figure: "Figure", path: Path) -> None:
    from tokendial.atomic import atomic_write
    from tokendial.show.report import png

    with atomic_write(path) as temporary:
        temporary.write_bytes(png(figure, dpi=150))


@app.command()
def predict(
    run: RunFolder,
    paths: Annotated[
        list[Path],
        typer.Argument(help="Images (videos, if the run is on videos), shards (.tar), folders."),
    ],
    degree: Degree = None,
    form: Annotated[Format, typer.Option("--format", help="Form of the output.")] = Format.csv,
    top: Annotated[int, typer.Option(min=1, help="Classes per file.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Dense tasks: folder for the masks.")] = None,
    overlay: Annotated[bool, typer.Option(help="Write the images under their masks, too.")] = False,
    tiles: Annotated[
        bool, typer.Option(help="Windows at full resolution, for large images.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Classes: on all GPUs of a cluster, by Ray Data.")
    ] = False,
    optimize: Optimize = False,
    compile: Compile = False,
    precision: Faster = Precision.fp32,
) -> None:
    """Class and probability, or mask, of each file; exit code 1 if some could not be read."""
    from tokendial.data import ImageError, VideoError, find_images, find_sources, find_videos
    from tokendial.runs import Run
    from tokendial.runs.predict import Prediction
    from tokendial.runs.predict import predict as run_prediction
    from tokendial.runs.predict_masks import MaskFile, predict_masks
    from tokendial.runs.predict_ray import predict_on_ray

    if out is None and (overlay or tiles):
        raise ValueError("overlay and tiles are for masks, which need a folder: --out.")
    if out is not None and ray:
        raise ValueError("ray is for classes: masks are written by one process.")
    speed = speed_of(optimize, compile, precision)
    if speed and (out is not None or ray):
        raise ValueError(
            "optimize, compile and precision are for classes, predicted by one process."
        )
    trained = Run(run)
    answers: Iterator[Prediction | MaskFile | ImageError | VideoError]
    if out is None:
        sources = find_videos(paths) if trained.on_videos() else find_sources(paths)
        if ray:
            answers = predict_on_ray(trained, sources, degree=degree, top=top)
        else:
            answers = run_prediction(trained, sources, degree=degree, top=top, speed=speed)
    else:
        files = find_videos(paths) if trained.on_videos() else find_images(paths)
        answers = predict_masks(trained, files, out, degree=degree, overlay=overlay, tiles=tiles)
    failed = False
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, answer in enumerate(answers):
        if number == 0 and form is Format.csv:
            writer.writerow(
                ["path", "class", "probability"] if out is None else ["path", "mask", "share"]
            )
        if isinstance(answer, ImageError | VideoError):
            failed = True
            print(f"error: {answer}", file=sys.stderr)
        elif form is Format.jsonl:
            print(json.dumps(dataclasses.asdict(answer)))
        elif isinstance(answer, MaskFile):
            writer.writerow([answer.path, answer.mask, f"{answer.share:.4f}"])
        else:
            for name, probability in zip(answer.classes, answer.probabilities, strict=True):
                writer.writerow([answer.path, name, f"{probability:.6f}"])
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(help="An image.")],
    degree: Degree = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("tokens.png"),
    diversity: Annotated[
        bool, typer.Option("--diversity", help="Plot attention diversity by depth instead.")
    ] = False,
) -> None:
    """Draw the tokens that are left at each depth, and the class attention."""
    from tokendial.atomic import atomic_write
    from tokendial.data.readers.images import read_image
    from tokendial.runs import Run
    from tokendial.show.report import png
    from tokendial.show.token_figures import run_diversity_figure, run_figure

    trained = Run(run)
    if trained.on_videos():
        raise ValueError(f"{run} is a run on videos; what can be shown are runs on images.")
    draw = run_diversity_figure if diversity else run_figure
    picture = read_image(image, trained.value_range())
    figure = draw(trained, picture, degree=degree, title=image.name)
    if not out.parent.is_dir():
        raise ValueError(f"out: no such folder: {out.parent}.")
    with atomic_write(out) as path:
        path.write_bytes(png(figure, dpi=150))
    print(f"wrote {out}")


class ExportFormat(StrEnum):
    """Formats of exported models."""

    onnx = "onnx"
    pt2 = "pt2"


@app.command()
def export(
    run: RunFolder,
    degree: Degree = None,
    degrees: Annotated[
        str | None, typer.Option(help="Several, such as 0,4,8: a bundle with one file of weights.")
    ] = None,
    to: Annotated[ExportFormat, typer.Option(help="Format.")] = ExportFormat.onnx,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per call; default: any number.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File (or folder of a bundle); default: RUN/export/.")
    ] = None,
) -> None:
    """Write the best model for other runtimes, and compare what the file gives."""
    from tokendial.export import export as export_model
    from tokendial.export import export_bundle, run_facts
    from tokendial.runs import Run
    from tokendial.runs.degrees import degrees_to_show

    model, folder = Run(run).model(), run / "export"
    facts = run_facts(Run(run), model)
    if degrees is None:
        path = out or folder / f"degree_{model.degree if degree is None else degree}.{to}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [export_model(model, path, degree=degree, batch=batch, facts=facts)]
    elif degree is not None or to is not ExportFormat.onnx:
        raise ValueError("degrees makes a bundle of ONNX files: leave degree and pt2 out.")
    else:
        wanted = degrees_to_show(model, degrees)
        found = export_bundle(model, out or folder, wanted, batch=batch, facts=facts)
    for each in found:
        print(
            f"wrote {each.path}: degree {each.degree}, {each.gmacs:.4g} GMACs, "
            f"logits differ by {each.difference:.1e}"
        )
