"""The command for models that hold a ViT: attach."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tokendial.cli.app import INSPECT_PANEL, app
from tokendial.cli.options import Degrees


@app.command(rich_help_panel=INSPECT_PANEL)
def attach(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Local folder of a model of transformers (with its image processor) or open_clip.",
        ),
    ],
    images: Annotated[list[Path], typer.Option(help="Image files or folders of images.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="Settings of the reduction method, such as reduce.inflection=1.",
        ),
    ] = None,
    reduce: Annotated[
        str,
        typer.Option(
            help="Reduction method without weights of its own: tome, pitome, prune_merge, evit or "
            "ffn_merge."
        ),
    ] = "tome",
    degrees: Degrees = "all",
    tower: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a ViT in the model, such as vision_model; may be given several times "
            "(default: all that are found)."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call of the model.")] = 8,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Floating-point format of weights and activations."),
    ] = "fp32",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for attached.csv and attached.png (default: none is written)."),
    ] = None,
) -> None:
    """Measure what a dial does to a model that holds a ViT: CLIP, depth, segmentation, poses.

    Nothing is trained, and the model's files stay as they are. At each degree, what the model
    itself gives for the images is compared with what it gives at degree 0: the nearest neighbours
    and cosine similarity of embeddings, the most probable class, the depth, the pixels of masks,
    heat maps or boxes. Prints a table of that, the cost of the ViTs and of the whole call, and the
    measured speed of the call.
    """
    from tokendial.cli.evaluation_output import (
        attached_table,
        warn_if_disturbed,
        write_evaluation,
    )
    from tokendial.data import find_images
    from tokendial.methods import from_json
    from tokendial.runs.evaluate_attached import RELATIVE_ERROR, evaluate_attached
    from tokendial.runs.image_model import open_image_model
    from tokendial.runs.progress import progress_bar
    from tokendial.runs.recipe_file import apply_overrides
    from tokendial.show.plots import dial_figure
    from tokendial.tasks.metric_titles import metric_title

    fields = apply_overrides({"reduce": {"name": reduce}}, settings or [])
    if others := sorted(set(fields) - {"reduce"}):
        raise ValueError(f"{others[0]}: attach takes settings of reduce only.")
    method, files = from_json("reduce", fields["reduce"]), find_images(images)
    opened = open_image_model(model)
    with progress_bar(Console(stderr=True)) as shown:
        found = evaluate_attached(
            opened,
            files,
            method,
            degrees,
            towers=tower or None,
            batch_size=batch_size,
            precision=precision,
            progress=shown.update,
        )
    shape = " x ".join(map(str, found.timed_shape))
    print(f"{opened.name}: {reduce} in {', '.join(found.towers)}")
    print(f"compared with degree 0: {' and '.join(found.compared)} of {opened.call}")
    print(f"images: {found.num_images}; cost and speed of {opened.call} on {shape}")
    # Files and pipes have no width of their own, and 80 characters are too few.
    Console(width=None if sys.stdout.isatty() else 120).print(attached_table(found.rows))
    warn_if_disturbed(found.rows)
    if out is not None:
        main = next(iter(found.rows[0].scores))
        title = metric_title(main)
        metric = f"1 - {title}" if main == RELATIVE_ERROR else title
        figure = dial_figure(found.rows, metric=metric, title=f"{model.name}, {reduce}")
        write_evaluation(found.rows, figure, out / "attached")
