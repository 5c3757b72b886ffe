"""Commands that train nothing: profile, data check, reproduce cost, weights convert."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tokendial.cli.app import app, data, reproduce, weights


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A timm model, such as deit_base_patch16_224.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Such as reduce.r=8 adapt.dim=32 model.img_size=[224,320]."),
    ] = None,
    reduce: Annotated[str | None, typer.Option(help="Reduction method: tome, evit.")] = None,
    adapt: Annotated[
        str | None, typer.Option(help="Fine-tuning method, such as dense_adapter.")
    ] = None,
    degrees: Annotated[str | None, typer.Option(help="Such as 0..16; default: as set.")] = None,
    num_classes: Annotated[int, typer.Option(min=0, help="Width of the head.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Parameters, multiply-accumulates and tokens per layer at each degree; no weights needed."""
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
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of a data set.")],
    classes: Annotated[
        int | None, typer.Option(min=2, help="Of a semantic segmentation; default: binary masks.")
    ] = None,
    ignore_zero: Annotated[
        bool, typer.Option("--ignore-zero", help="Value 0 is no class, as in ADE20K.")
    ] = False,
    train: Annotated[str, typer.Option(help="Name of the training folders.")] = "training",
    val: Annotated[str, typer.Option(help="Name of the validation folders.")] = "validation",
    mask: Annotated[str, typer.Option(help="As data.mask of a recipe, such as nonzero.")] = "auto",
    ignore: Annotated[str, typer.Option(help="As data.ignore, such as 255.")] = "null",
    palette: Annotated[str, typer.Option(help="As data.palette, such as voc.")] = "null",
    value_range: Annotated[
        str, typer.Option("--range", help="As data.range, such as [0,4095].")
    ] = "null",
) -> None:
    """List what is wrong with a folder of classes, or of images and masks; exit code 1 if any.

    Unreadable files and classes without images; of masks unpaired files, differing sizes and odd
    values. Of binary masks also what is inside, and how much of each split that is.
    """
    if not any((root / name).is_dir() for name in ("images", "annotations")):
        _check_class_folders(root, train, val, value_range)
        return
    from tokendial.data.check import check_pairs
    from tokendial.runs.recipe import check_method
    from tokendial.runs.recipe_file import apply_overrides

    fields: dict[str, Any] = {"name": "pairs", "root": str(root), "train": train, "val": val}
    fields |= {"classes": classes, "ignore_zero": ignore_zero}
    told = {"mask": mask, "ignore": ignore, "palette": palette, "range": value_range}
    overrides = [f"{name}={value}" for name, value in told.items()]
    pairs = check_method("data", apply_overrides(fields, overrides))
    count = sum(len(pairs.pairs(root, split)[0]) for split in (train, val))
    found = 0
    notes: list[str] = []
    for problem in check_pairs(pairs, root, notes):
        print(problem)
        found += 1
    for note in notes:
        print(f"{root}: {note}")
    print(f"{root}: {count} pairs, {f'{found} problems' if found else 'no problems'}")
    if found:
        raise typer.Exit(1)


def _check_class_folders(root: Path, train: str, val: str, value_range: str) -> None:
    from tokendial.data.check import check_folders
    from tokendial.runs.recipe import check_method
    from tokendial.runs.recipe_file import apply_overrides

    fields = {"name": "image_folder", "root": str(root)}
    of_files = check_method("data", apply_overrides(fields, [f"range={value_range}"])).range
    # The names that such folders have by default; they stand for those of pairs, too.
    names = {"training": "train", "validation": "val"}
    problems, summary = check_folders(root, names.get(train, train), names.get(val, val), of_files)
    for problem in problems:
        print(problem)
    found = f"{len(problems):,} problems" if problems else "no problems"
    print(f"{root}: {summary}; {found}")
    if problems:
        raise typer.Exit(1)


@reproduce.command("cost")
def reproduce_cost(
    out: Annotated[Path, typer.Option(help="Folder for cost.csv and cost.md.")] = Path("reproduce"),
) -> None:
    """Parameters and costs of the papers' tables, counted on the real models."""
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

    found = list(track(cost_rows(), "counting", total=len(read_tables()), console=Console()))
    table = Table(*HEADER)
    for row in found:
        table.add_row(*cells(row))
    # Eleven columns need room; in a file or a pipe there is as much as one asks for.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(found, out / "cost.csv")
    write_markdown(found, out / "cost.md")
    for row in found:
        if row.note and not row.should_agree and row.verdict != "not in the paper":
            print(f"{row.paper} {row.table}, {row.row}: {row.verdict}. {row.note}")
    wanted = [row for row in found if row.should_agree]
    agreeing = [r for r in wanted if {r.params_agree, r.cost_agree} <= {"", *AGREES}]
    print(f"{len(found)} rows; {len(agreeing)} of the {len(wanted)} that should agree do")
    print(f"wrote {out / 'cost.csv'} and {out / 'cost.md'}")


@weights.command("convert")
def weights_convert(
    file: Annotated[
        Path, typer.Argument(help="DINOv2, DINO, DeiT, MAE, DAR (.pth) or AugReg (.npz).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="With --recipe: such as model.weights=dinov2.safetensors."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="timm model; default: the one that the tensors belong to.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Of DAR's fine-tuned files, such as dar/duts: make a run.")
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(help="Resize positions for images of 224 or HEIGHTxWIDTH pixels."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File (or run) to write; default: FILE with .safetensors."),
    ] = None,
) -> None:
    """Write a released file as model.weights of a recipe takes it; nothing is unpickled."""
    from tokendial.backbones import convert_weights

    if recipe is not None:
        if model is not None or img_size is not None:
            raise ValueError("model and img_size are the recipe's own: leave them out.")
        from tokendial.runs import read_recipe
        from tokendial.runs.released import released_run

        settings = [*(overrides or []), *([f"output={out}"] if out else [])]
        run = released_run(file, read_recipe(recipe, settings))
        print(f"wrote {run.folder}: DAR's model of {recipe}")
        return
    if overrides:
        raise ValueError(f"settings of a recipe go with --recipe, got {overrides[0]}.")
    converted = convert_weights(file, model)
    if img_size is not None:
        converted = converted.at(_size(img_size))
    path = converted.save(out)
    print(f"wrote {path}: {converted.summary()}")


def _size(text: str) -> tuple[int, int]:
    """Height and width written as 224 or 224x320."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"img_size must look like 224 or 224x320, got {text!r}.")
    return int(sides[0]), int(sides[-1])
