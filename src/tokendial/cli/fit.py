"""The command that searches token schedules for a budget: fit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.options import (
    ImageSize,
    ModelName,
    PlainPrecisionOption,
    RuntimeChoice,
    Weights,
)

if TYPE_CHECKING:
    from tokendial.tune import FitPoint, FitResult


@app.command(rich_help_panel=USE_PANEL)
def fit(
    model: ModelName,
    speedup: Annotated[
        str | None,
        typer.Option(
            help="Budget: how many times as fast as degree 0, such as 2 or 1.5,2,3 for three "
            "degrees. Measured on this machine."
        ),
    ] = None,
    latency_ms: Annotated[
        str | None,
        typer.Option(
            help="Budget: milliseconds per batch, one or several. Measured on this machine."
        ),
    ] = None,
    gmacs: Annotated[
        str | None,
        typer.Option(
            help="Budget: 1e9 multiply-accumulates per image, one or several. Counted, not timed."
        ),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(
            help="Reduction method, one that removes tokens by number: tome, evit, pitome or "
            "prune_merge (default: the run's, or tome if it has none)."
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            help="Schedules to start the search from: a folder that an earlier fit wrote, or the "
            "name of a backbone with a preset, such as vit_small_patch14_dinov2 (default: those "
            "of MODEL, if it was fitted)."
        ),
    ] = None,
    agree_by: Annotated[
        Literal["logits", "embeddings", "neighbours", "feature_map", "masks"] | None,
        typer.Option(
            help="What schedules are compared by with the model that removes nothing: the classes, "
            "the embeddings, which images are nearest neighbours, the features at each position, "
            "or the masks (default: masks with a decoder, logits with a head, else embeddings)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, or of videos, to compare schedules on (default: the run's "
            "training images; a model of no run needs it)."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Number of images to compare schedules on, at most.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    runtime: Annotated[
        RuntimeChoice,
        typer.Option(
            help="Program whose times the budget is for: torch, onnxruntime or openvino. In the "
            "last two, each schedule that is timed is exported first: give it more --minutes."
        ),
    ] = "torch",
    precision: PlainPrecisionOption = "fp32",
    minutes: Annotated[float, typer.Option(help="Time limit of the whole search.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choice of images.")] = 0,
    weights: Weights = None,
    img_size: ImageSize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the fitted model (default: RUN/fitted; needed for the name of a "
            "backbone)."
        ),
    ] = None,
) -> None:
    """Search how many tokens each layer should remove to meet a budget of time or compute.

    Give one kind of budget: --speedup, --latency-ms or --gmacs. Nothing is trained and no labels
    are used: schedules are compared by how far they change what the model gives (--agree-by).
    Writes a model whose degrees 1, 2, ... meet the budgets; that of a run is used like a run.
    """
    from tokendial.atomic import atomic_write
    from tokendial.runs.fit import fit_run
    from tokendial.runs.model_source import ModelSource
    from tokendial.runtimes import Runtime
    from tokendial.show.plots import fit_figure
    from tokendial.show.report import png

    budgets = {"speedup": speedup, "latency_ms": latency_ms, "gmacs": gmacs}
    source, console = ModelSource(name=model, weights=weights, img_size=img_size), Console()
    if out is None and not source.is_folder:
        raise ValueError(f"out must be a folder for the fitted model of {model}.")
    folder = out or Path(model) / "fitted"
    result = fit_run(
        source,
        folder,
        {kind: _numbers(kind, text) for kind, text in budgets.items() if text is not None},
        reduce=reduce,
        start_from=start_from,
        agree_by=agree_by,
        calibration=calibration,
        images=images,
        seed=seed,
        batch_size=batch_size,
        runtime=Runtime(runtime, precision),
        minutes=minutes,
        note=lambda text: console.print(text, highlight=False),
    )
    console.print(_table(result))
    for warning in result.warnings():
        print(warning)
    with atomic_write(folder / "fit.png") as path:
        path.write_bytes(png(fit_figure(result, title=model)))
    if (folder / "recipe.yaml").is_file():
        print(f"wrote {folder}: tokendial eval {folder} --degrees all")
    else:
        print(f"wrote {folder}: tokendial embed {folder} IMAGES --out features.safetensors")


def _numbers(kind: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{kind} must look like 2 or 1.5,2,3, got {text!r}.") from None


def _table(result: "FitResult") -> Table:
    """Each degree, and below it the constant schedule that costs no more."""
    titles = (result.divergence_title, result.same_title)
    table = Table("degree", "removed per layer", result.unit, "speed-up", *titles)
    table.add_row("0", "nothing", f"{result.unreduced:.4g}", "1.00", "0", "100.0%")
    for degree in result.degrees:
        removed = " ".join(map(str, degree.found.removed))
        table.add_row(str(degree.degree), removed, *_cells(result, degree.found))
        if degree.constant:
            constant = f"constant {degree.constant.removed[0]}"
            table.add_row("", constant, *_cells(result, degree.constant))
    return table


def _cells(result: "FitResult", point: "FitPoint") -> tuple[str, ...]:
    return (
        f"{result.unreduced * point.cost:.4g}",
        f"{point.speedup:.2f}",
        f"{point.divergence:.4f}",
        f"{point.top1:.1%}",
    )
