"""The command that writes embeddings of images: embed."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.options import (
    Degree,
    ImageSize,
    PlainPrecisionOption,
    PlainRuntimeOption,
    Weights,
)


@app.command(rich_help_panel=USE_PANEL)
def embed(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, of a saved model, or of a model of transformers or open_clip; "
            "or name of a backbone: a timm model such as vit_small_patch14_dinov2, or "
            "transformers.CLASS.",
        ),
    ],
    paths: Annotated[
        list[Path], typer.Argument(help="Image files, folders or shards (.tar) of images.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File to write, .safetensors or .parquet. The same command continues an "
            "interrupted one."
        ),
    ],
    degree: Degree = None,
    features: Annotated[
        Literal["pooled", "mean", "map"],
        typer.Option(
            help="pooled: what the head reads, or a model without a head gives; mean: the mean of "
            "the features of all positions; map: the features of each position."
        ),
    ] = "pooled",
    reduce: Annotated[
        str | None,
        typer.Option(
            help="Reduction method, such as tome or evit, in place of the model's own (default: "
            "the run's; none for the name of a backbone)."
        ),
    ] = None,
    weights: Weights = None,
    img_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    runtime: PlainRuntimeOption = "torch",
    precision: PlainPrecisionOption = "fp32",
    ray: Annotated[
        bool, typer.Option("--ray", help="Use all GPUs of a Ray cluster, by Ray Data.")
    ] = False,
) -> None:
    """Write embeddings of images: what a model gives before its classifier.

    A .safetensors file holds the tensor "embeddings", and a .json file beside it the paths of its
    rows; a .parquet file holds both. Exit code 1 if some files could not be read; the other files
    are embedded.
    """
    from tokendial.data import find_sources
    from tokendial.methods import from_json
    from tokendial.runs.embed import EmbedSettings
    from tokendial.runs.embedding_files import embed_to_file
    from tokendial.runs.model_source import ModelSource
    from tokendial.runs.progress import progress_bar

    settings = EmbedSettings(
        degree=degree,
        reduce=from_json("reduce", {"name": reduce}) if reduce else None,
        features=features,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
    )
    with progress_bar(Console(stderr=True)) as shown:
        written = embed_to_file(
            ModelSource(name=model, weights=weights, img_size=img_size),
            find_sources(paths),
            out,
            settings,
            ray=ray,
            progress=shown.update,
            note=shown.print,
        )
    for error in written.unreadable:
        print(f"error: {error}", file=sys.stderr)
    count, *shape = written.shape
    size = " x ".join(map(str, shape))
    print(f"wrote {written.path}: {count} embeddings of {size} numbers")
    if written.unreadable:
        raise typer.Exit(1)
