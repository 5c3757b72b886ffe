"""The command that measures a finished run along the dial: eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.evaluation_output import (
    cascade_table,
    class_table,
    compensator_table,
    dial_table,
    warn_if_disturbed,
    write_evaluation,
    write_picture,
)
from tokendial.cli.options import (
    Compile,
    Degrees,
    ImageSize,
    Optimize,
    PrecisionOption,
    RuntimeOption,
    Weights,
    runtime_for,
    runtime_of,
)

if TYPE_CHECKING:
    from tokendial.runs.model_source import ModelSource
    from tokendial.runtimes import Runtime


@app.command("eval", rich_help_panel=USE_PANEL)
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folder of a run. With --compensator, one or more. With --images also a saved "
            "model, or the name of a backbone.",
        ),
    ],
    degrees: Degrees = "all",
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Evaluate the run's cascade (see tokendial cascade), beside its degrees or those "
            "of --degrees.",
        ),
    ] = False,
    compensator: Annotated[
        str | None,
        typer.Option(help="Folder of a compensator: evaluate the runs without and with it."),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            help="With --compensator: the degree that each run was trained at, such as 0,8,16 "
            "(default: read from the runs)."
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Evaluate embeddings instead, of these image files or folders: how near they stay "
            "to those at degree 0. Several folders are classes."
        ),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(help="With --images: reduction method in place of the model's own, as tome."),
    ] = None,
    weights: Weights = None,
    img_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    optimize: Optimize = False,
    compile: Compile = False,
    runtime: RuntimeOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Measure accuracy, cost and speed of a run at several degrees of the dial.

    Evaluates the best model on the validation set. Prints a table, and writes it as CSV with a plot
    into RUN/eval. For classification also recall and precision of each class, and a confusion
    matrix.

    With --images, measures what reduction changes in the embeddings: cosine similarity to those at
    degree 0, nearest neighbours that stay the same, and accuracy by nearest neighbours if the
    images lie in a folder for each class.
    """
    asked = runtime_of(runtime, precision, optimize, compile)
    if images:
        if asked or cascade or compensator is not None or sources is not None or len(runs) > 1:
            raise ValueError(
                "images is for one model; it cannot be combined with --cascade, --compensator, "
                "--sources, --runtime, --precision, --optimize and --compile."
            )
        from tokendial.runs.model_source import ModelSource

        source = ModelSource(name=str(runs[0]), weights=weights, img_size=img_size)
        _evaluate_embeddings(source, images, degrees, reduce, batch_size)
        return
    for name, value in (("reduce", reduce), ("weights", weights), ("img_size", img_size)):
        if value is not None:
            raise ValueError(f"{name} needs --images, got {value}.")
    if compensator is not None:
        if asked or cascade:
            raise ValueError(
                "cascade, runtime, precision, optimize and compile cannot be combined with "
                "--compensator."
            )
        _evaluate_compensator(runs, degrees, compensator, sources, batch_size)
        return
    if len(runs) > 1 or sources is not None:
        raise ValueError("several runs, and --sources, need --compensator.")
    (run,) = runs
    chosen = runtime_for(run, asked)
    if cascade:
        _evaluate_cascade(run, degrees, batch_size, chosen)
        return
    from tokendial.runs import Run
    from tokendial.runs.evaluate import evaluate as run_evaluation
    from tokendial.runs.evaluation_tables import write_classes
    from tokendial.runs.progress import progress_bar
    from tokendial.show.confusion import confusion_figure
    from tokendial.show.plots import dial_figure
    from tokendial.tasks.metric_titles import metric_title

    opened, console = Run(run), Console(stderr=True)
    with progress_bar(console) as shown:
        rows = run_evaluation(
            opened, degrees, batch_size=batch_size, runtime=chosen, progress=shown.update
        )
    unit = "clip" if opened.has_videos() else "image"
    Console().print(dial_table(rows, unit))
    warn_if_disturbed(rows)
    stem = run / "eval" / "degrees"
    main = metric_title(next(iter(rows[0].scores)))
    write_evaluation(rows, dial_figure(rows, metric=main, title=str(run), unit=unit), stem)
    matrices = [(row.degree, row.confusion.numpy()) for row in rows if row.confusion is not None]
    if matrices:
        classes = opened.classes()
        Console().print(class_table(rows, classes))
        ends = [matrices[0], matrices[-1]] if len(matrices) > 1 else matrices
        table, picture = stem.with_name("classes.csv"), stem.with_name("confusion.png")
        write_classes(rows, classes, table)
        write_picture(confusion_figure(ends, classes, title=str(run)), picture)
        print(f"wrote {table} and {picture}")


def _evaluate_cascade(run: Path, degrees: str, batch_size: int, runtime: "Runtime") -> None:
    from tokendial.runs import Run
    from tokendial.runs.evaluate_cascade import evaluate_cascade
    from tokendial.runs.evaluation_tables import write_rows
    from tokendial.runs.progress import progress_bar

    with progress_bar(Console(stderr=True)) as shown:
        rows = evaluate_cascade(
            Run(run),
            None if degrees == "all" else degrees,
            batch_size=batch_size,
            runtime=runtime,
            progress=shown.update,
        )
    Console().print(cascade_table(rows))
    warn_if_disturbed(rows)
    path = run / "eval" / "cascade.csv"
    write_rows(rows, path)
    print(f"wrote {path}")


def _evaluate_embeddings(
    source: "ModelSource", paths: list[Path], degrees: str, reduce: str | None, batch_size: int
) -> None:
    from tokendial.data import find_sources
    from tokendial.methods import from_json
    from tokendial.runs.evaluate_embeddings import evaluate_embeddings, labels_by_folder
    from tokendial.runs.progress import progress_bar
    from tokendial.show.plots import dial_figure

    images = find_sources(paths)
    with progress_bar(Console(stderr=True)) as shown:
        rows = evaluate_embeddings(
            source,
            images,
            degrees,
            labels=labels_by_folder(images),
            reduce=from_json("reduce", {"name": reduce}) if reduce else None,
            batch_size=batch_size,
            progress=shown.update,
        )
    Console().print(dial_table(rows, "image"))
    warn_if_disturbed(rows)
    if source.is_folder:
        figure = dial_figure(rows, metric="same neighbours", title=source.name, unit="image")
        write_evaluation(rows, figure, Path(source.name) / "eval" / "embeddings")


def _evaluate_compensator(
    folders: list[Path], degrees: str, compensator: str, sources: str | None, batch_size: int
) -> None:
    from tokendial.compensate import Compensator
    from tokendial.runs import Run
    from tokendial.runs.degrees import parse_degrees
    from tokendial.runs.evaluate_compensator import evaluate_compensator
    from tokendial.runs.progress import progress_bar
    from tokendial.show.plots import compensator_figure

    loaded = Compensator.from_pretrained(compensator)
    offered = tuple(range(loaded.steps + 1))
    with progress_bar(Console(stderr=True)) as shown:
        rows = evaluate_compensator(
            [Run(folder) for folder in folders],
            loaded,
            degrees,
            sources=parse_degrees(sources, offered) if sources else None,
            batch_size=batch_size,
            progress=shown.update,
        )
    Console().print(compensator_table(rows))
    warn_if_disturbed(rows)
    figure = compensator_figure(rows, title=f"scale {loaded.scale:g}")
    write_evaluation(rows, figure, folders[0] / "eval" / "bridged")
