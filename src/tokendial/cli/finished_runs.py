"""Commands that use a finished run: eval, predict, show, export."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.evaluation_output import (
    cascade_table,
    class_table,
    compensator_table,
    dial_table,
    int8_table,
    warn_if_disturbed,
    write_evaluation,
    write_picture,
)
from tokendial.cli.options import (
    CompensatorFolder,
    Compile,
    Degree,
    Degrees,
    ImageSize,
    Optimize,
    PrecisionOption,
    RunFolder,
    RuntimeOption,
    Weights,
    runtime_for,
    runtime_of,
)

if TYPE_CHECKING:
    from tokendial.runs import Run
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


@app.command(rich_help_panel=USE_PANEL)
def predict(
    run: RunFolder,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, folders or shards (.tar) of images; video files and folders if the "
            "run is on videos."
        ),
    ],
    degree: Degree = None,
    compensator: CompensatorFolder = None,
    form: Annotated[
        Literal["csv", "jsonl"],
        typer.Option("--format", help="Output format: CSV, or one JSON object per line."),
    ] = "csv",
    top: Annotated[int, typer.Option(min=1, help="Number of most probable classes per file.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Masks: folder to write them to, as PNG files.")
    ] = None,
    overlay: Annotated[
        bool, typer.Option(help="Masks: also write each image with its mask drawn over it.")
    ] = False,
    tiles: Annotated[
        bool,
        typer.Option(
            help="Masks: run the model on overlapping windows of the image instead of resizing it. "
            "For small objects in large images."
        ),
    ] = False,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Answer by the run's cascade (see tokendial cascade) instead of one degree. The "
            "output names the degree that answered.",
        ),
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Classes: use all GPUs of a Ray cluster, by Ray Data.")
    ] = False,
    optimize: Optimize = False,
    compile: Compile = False,
    runtime: RuntimeOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Predict the class, or the mask, of images or videos.

    Prints path, class and probability of each file. Runs on masks write PNG files (--out) and print
    their paths. Exit code 1 if some files could not be read; the other files are predicted.
    """
    from tokendial.data import ImageError, VideoError, find_images, find_sources, find_videos
    from tokendial.runs import Run
    from tokendial.runs.predict import Prediction
    from tokendial.runs.predict import predict as run_prediction
    from tokendial.runs.predict_masks import MaskFile, predict_masks
    from tokendial.runs.predict_ray import predict_on_ray
    from tokendial.runtimes import PLAIN

    if out is None and (overlay or tiles):
        raise ValueError("overlay and tiles are for masks, which need a folder: --out.")
    if out is not None and ray:
        raise ValueError("ray is for classes: masks are written by one process.")
    asked = runtime_of(runtime, precision, optimize, compile)
    if (asked or cascade) and ray:
        raise ValueError(
            "ray predicts classes in PyTorch: leave out --runtime, --precision, --optimize, "
            "--compile and --cascade."
        )
    opened = Run(run)
    chosen = PLAIN if ray else runtime_for(run, asked)
    answers: Iterator[Prediction | MaskFile | ImageError | VideoError]
    if out is None:
        sources = find_videos(paths) if opened.has_videos() else find_sources(paths)
        if ray:
            answers = predict_on_ray(
                opened, sources, degree=degree, top=top, compensator=compensator
            )
        else:
            answers = run_prediction(
                opened,
                sources,
                degree=degree,
                top=top,
                runtime=chosen,
                cascade=cascade,
                compensator=compensator,
            )
    else:
        files = find_videos(paths) if opened.has_videos() else find_images(paths)
        answers = predict_masks(
            opened,
            files,
            out,
            degree=degree,
            overlay=overlay,
            tiles=tiles,
            runtime=chosen,
            cascade=cascade,
            compensator=compensator,
        )
    failed = False
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for index, answer in enumerate(answers):
        if index == 0 and form == "csv":
            names = ["class", "probability"] if out is None else ["mask", "share"]
            writer.writerow(["path", *names, *["degree"] * cascade])
        if isinstance(answer, ImageError | VideoError):
            failed = True
            print(f"error: {answer}", file=sys.stderr)
        elif form == "jsonl":
            print(json.dumps(dataclasses.asdict(answer)))
        elif isinstance(answer, MaskFile):
            row = [answer.path, answer.mask, f"{answer.share:.4f}"]
            writer.writerow([*row, *[answer.degree] * cascade])
        else:
            for name, probability in zip(answer.classes, answer.probabilities, strict=True):
                row = [answer.path, name, f"{probability:.6f}"]
                writer.writerow([*row, *[answer.degree] * cascade])
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE_PANEL)
def show(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    degree: Degree = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("tokens.png"),
    diversity: Annotated[
        bool,
        typer.Option(
            "--diversity",
            help="Instead of the tokens, plot how much the attention rows of each layer differ, "
            "with and without reduction.",
        ),
    ] = False,
) -> None:
    """Draw which tokens of an image are merged, dropped or skipped at each depth.

    Writes a PNG file with the image, its tokens after each layer that reduces them, and the
    attention of the class token in the last layer.
    """
    from tokendial.data.readers.images import read_image
    from tokendial.runs import Run
    from tokendial.show.token_figures import run_diversity_figure, run_figure

    opened = Run(run)
    if opened.has_videos():
        raise ValueError(f"{run} is a run on videos; only runs on images can be shown.")
    draw = run_diversity_figure if diversity else run_figure
    picture = read_image(image, opened.value_range())
    figure = draw(opened, picture, degree=degree, title=image.name)
    if not out.parent.is_dir():
        raise ValueError(f"out: no such folder: {out.parent}.")
    write_picture(figure, out)
    print(f"wrote {out}")


_ENDINGS = {"onnx": "onnx", "pt2": "pt2", "openvino": "xml"}


@app.command(rich_help_panel=USE_PANEL)
def export(
    run: RunFolder,
    degree: Degree = None,
    compensator: CompensatorFolder = None,
    degrees: Annotated[
        str | None,
        typer.Option(
            help="Several degrees, such as 0,4,8: ONNX or OpenVINO files that share one file of "
            "weights."
        ),
    ] = None,
    to: Annotated[
        Literal["onnx", "pt2", "openvino"],
        typer.Option(help="File format: ONNX, pt2 of torch.export, or OpenVINO."),
    ] = "onnx",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Fixed number of images per call (default: any number)."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings", help="Also give embeddings: what the model gives before its classifier."
        ),
    ] = False,
    feature_map: Annotated[
        bool,
        typer.Option(
            "--feature-map",
            help="Also give the features at every patch; merged tokens are copied back to all "
            "their positions.",
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="ONNX files whose linear layers compute in 8 bits. They are evaluated on the "
            "validation set first.",
        ),
    ] = False,
    max_loss: Annotated[
        float,
        typer.Option(
            min=0, help="With --int8: refuse files that lose more points of the main metric."
        ),
    ] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, or folder of a bundle (default: in RUN/export)."),
    ] = None,
) -> None:
    """Write the best model as an ONNX, OpenVINO or torch.export file, for other runtimes.

    Each file holds one degree of the dial. It is run on random images, and refused if its outputs
    differ from the model's.
    """
    from tokendial.export_files import export as export_model
    from tokendial.export_files import export_bundle
    from tokendial.runs import Run
    from tokendial.runs.compensated import load_compensated
    from tokendial.runs.degrees import degrees_to_show
    from tokendial.runs.export_facts import run_facts

    opened = Run(run)
    if degrees is not None and degree is not None:
        raise ValueError("degrees writes a bundle of several degrees: leave out --degree.")
    if int8:
        if batch is not None or compensator or embeddings or feature_map or to != "onnx":
            raise ValueError(
                "int8 writes ONNX files of logits for any batch: leave out --to, --batch, "
                "--compensator, --embeddings and --feature-map."
            )
        _export_int8(opened, degree, degrees, max_loss, out)
        return
    model, folder = load_compensated(opened, compensator), run / "export"
    facts = run_facts(opened, model)
    if degrees is None:
        path = out or folder / f"degree_{model.degree if degree is None else degree}.{_ENDINGS[to]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [
            export_model(
                model,
                path,
                degree=degree,
                batch=batch,
                facts=facts,
                embeddings=embeddings,
                feature_map=feature_map,
            )
        ]
    else:
        files = export_bundle(
            model,
            out or (folder / to if to == "openvino" else folder),
            degrees_to_show(model, degrees),
            to=to,
            batch=batch,
            facts=facts,
            embeddings=embeddings,
            feature_map=feature_map,
        )
    for exported in files:
        print(
            f"wrote {exported.path}: degree {exported.degree}, {exported.gmacs:.4g} GMACs, "
            f"outputs differ by {exported.difference:.1e}"
        )


def _export_int8(
    run: "Run", degree: int | None, degrees: str | None, max_loss: float, out: Path | None
) -> None:
    from tokendial.runs.degrees import degrees_to_show
    from tokendial.runs.export_int8 import export_int8, export_int8_bundle

    if degrees is not None:
        wanted = degrees_to_show(run.model(), degrees)
        files = export_int8_bundle(run, wanted, out, max_loss=max_loss / 100)
        Console().print(int8_table(files))
        print(f"wrote {files[0].path.parent}")
        return
    found = export_int8(run, out, degree=degree, max_loss=max_loss / 100)
    print(
        f"wrote {found.path}: degree {found.degree}, {found.metric} {found.after:.1%} "
        f"(float32: {found.before:.1%})"
    )
    if found.accuracy_lost is not None:
        lost = found.accuracy_lost.percent(sign=True)
        print(f"accuracy lost, in points with the 95 % interval: {lost}")
