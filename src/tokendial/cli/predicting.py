"""Commands that run a finished run on images: predict, show."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.evaluation_output import write_picture
from tokendial.cli.options import (
    CompensatorFolder,
    Compile,
    Degree,
    Optimize,
    PrecisionOption,
    RunFolder,
    RuntimeOption,
    runtime_for,
    runtime_of,
)


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
