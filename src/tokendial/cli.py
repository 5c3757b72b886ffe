"""The command line: `tokendial COMMAND`. Each command parses, calls the library, and reports."""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import tokendial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokendial.train.evaluate import BridgedRow, DegreeRow
    from tokendial.train.recipe import BaseRecipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One fine-tuned Vision Transformer, run at any cost.",
)
reproduce = typer.Typer(no_args_is_help=True, help="What papers print, computed anew.")
app.add_typer(reproduce, name="reproduce")
data = typer.Typer(no_args_is_help=True, help="Folders of images.")
app.add_typer(data, name="data")
weights = typer.Typer(no_args_is_help=True, help="Released weight files.")
app.add_typer(weights, name="weights")
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Degree = Annotated[
    int | None, typer.Option(help="Degree of the dial; default: the one that was trained.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Two updates, one batch of evaluation; keep nothing.")
]
Degrees = Annotated[str, typer.Option(help="Such as 0,4,8 or 0..16 or 0..16:4 or all.")]


_SHOWN_SCORES = 3


class Format(StrEnum):
    """Formats of predictions."""

    csv = "csv"
    jsonl = "jsonl"


class DemoTask(StrEnum):
    """What the demo learns."""

    counting = "counting"
    masks = "masks"


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    # Of the system: no such folder, no permission, disk full, the hub out of reach.
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1]
    # A loading process wraps its error in a traceback, which ends with "Type: message".
    return last.partition(": ")[2] if "Original Traceback" in text else last


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """One fine-tuned Vision Transformer, run at any cost."""
    if show:
        print(f"tokendial {tokendial.__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 data.root=/images.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train as a recipe says; started again, go on where the run stopped."""
    from tokendial.train import read_recipe
    from tokendial.train import train as run_training

    read = read_recipe(recipe, overrides or [])
    if dry_run:
        from tokendial.train.finetune import FineTuning

        _try_out(read, FineTuning)
        return
    _to_its_end(lambda: run_training(read))


@app.command()
def compensate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as train.epochs=10 data.root=/images.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a compensator for a pre-trained model; no labels needed."""
    from tokendial.train import CompensateRecipe, read_recipe
    from tokendial.train import compensate as run_training

    read = read_recipe(recipe, overrides or [], kind=CompensateRecipe)
    if dry_run:
        from tokendial.train.compensate import Compensating

        _try_out(read, Compensating)
        return
    _to_its_end(lambda: run_training(read))


def _try_out(recipe: "BaseRecipe", make_job: Callable[..., object]) -> None:
    from tokendial.train.dry_run import dry_run

    seen = dry_run(recipe, make_job)
    numbers = {name: value for name, value in seen.metrics.items() if isinstance(value, float)}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())
    print(f"dry run in {seen.seconds:.1f} s, nothing kept: {shown}")


def _to_its_end(run: Callable[[], object]) -> None:
    from tokendial.train import InterruptedRunError

    try:
        run()
    except InterruptedRunError:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Of a recipe: say what it is, and every field of it.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema, for editors.")
    ] = False,
) -> None:
    """List the recipes that are shipped, or explain one."""
    import yaml

    from tokendial.train.recipe_file import (
        describe,
        find_recipe,
        recipe_schema,
        resolved_recipe,
        shipped_recipes,
    )

    if schema:
        print(json.dumps(recipe_schema(), indent=2))
    elif name is None:
        table = Table("recipe", "what it is", box=None)
        for shipped, path in shipped_recipes().items():
            first, _, _ = describe(path).replace("\n", " ").partition(". ")
            table.add_row(shipped, first.rstrip("."))
        Console().print(table)
    else:
        print(f"{describe(find_recipe(name)[0])}\n")
        print(yaml.safe_dump(resolved_recipe(name), sort_keys=False), end="")


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
) -> None:
    """Accuracy, cost and speed of a run along the dial: table, CSV and plot."""
    if compensator is not None:
        _evaluate_bridged(runs, degrees, compensator, sources, batch_size)
        return
    if len(runs) > 1 or sources is not None:
        raise ValueError("several runs and sources go with --compensator only.")
    (run,) = runs
    from tokendial.show.plots import dial_figure
    from tokendial.train import Run
    from tokendial.train.evaluate import evaluate as run_evaluation

    rows = run_evaluation(Run(run), degrees, batch_size=batch_size)
    # Of many metrics (each class has one of its own) the first tell enough; the CSV has all.
    shown = list(rows[0].scores)[:_SHOWN_SCORES]
    names = [name.replace("_", " ") for name in shown]
    # Where tokens are chosen by their values, every one leaves the last layer.
    last = "tokens left" if rows[0].share is None else "tokens processed"
    table = Table("degree", *names, "GMACs", "images/s", last)
    for row in rows:
        table.add_row(
            str(row.degree),
            *(f"{row.scores[name]:.2%}" for name in shown),
            f"{row.gmacs:.4f}",
            f"{row.images_per_s:.0f}",
            str(row.tokens) if row.share is None else f"{row.share:.1%}",
        )
    Console().print(table)
    _write_evaluation(rows, dial_figure(rows, title=str(run)), run / "eval" / "degrees")


def _evaluate_bridged(
    folders: list[Path], degrees: str, compensator: str, sources: str | None, batch_size: int
) -> None:
    from tokendial.compensate import Compensator
    from tokendial.show.plots import bridged_figure
    from tokendial.train import Run
    from tokendial.train.evaluate import evaluate_bridged, parse_degrees

    plugin = Compensator.from_pretrained(compensator)
    offered = tuple(range(plugin.steps + 1))
    rows = evaluate_bridged(
        [Run(folder) for folder in folders],
        plugin,
        degrees,
        sources=parse_degrees(sources, offered) if sources else None,
        batch_size=batch_size,
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
            f"{row.images_per_s:.0f}",
        )
    Console().print(table)
    figure = bridged_figure(rows, title=f"scale {plugin.scale:g}")
    _write_evaluation(rows, figure, folders[0] / "eval" / "bridged")


def _write_evaluation(
    rows: "Sequence[DegreeRow] | Sequence[BridgedRow]", figure: "Figure", stem: Path
) -> None:
    """Write the rows as CSV and their figure as PNG, and say where."""
    from tokendial.atomic import replacing
    from tokendial.show.report import png
    from tokendial.train.evaluate import write_rows

    table, plot = stem.with_suffix(".csv"), stem.with_suffix(".png")
    write_rows(rows, table)
    with replacing(plot) as path:
        path.write_bytes(png(figure))
    print(f"wrote {table} and {plot}")


@app.command()
def predict(
    run: RunFolder,
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    degree: Degree = None,
    form: Annotated[Format, typer.Option("--format", help="Form of the output.")] = Format.csv,
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Dense tasks: folder for the masks.")] = None,
    overlay: Annotated[bool, typer.Option(help="Write the images under their masks, too.")] = False,
    tiles: Annotated[
        bool, typer.Option(help="Windows at full resolution, for large images.")
    ] = False,
) -> None:
    """Class and probability, or mask, of each image; exit code 1 if some could not be read."""
    from tokendial.data.images import ImageError, find_images
    from tokendial.train import Run
    from tokendial.train.predict import MaskFile, Prediction, predict_masks
    from tokendial.train.predict import predict as run_prediction

    if out is None and (overlay or tiles):
        raise ValueError("overlay and tiles are for masks, which need a folder: --out.")
    files = find_images(paths)
    answers: Iterator[Prediction | MaskFile | ImageError] = (
        run_prediction(Run(run), files, degree=degree, top=top)
        if out is None
        else predict_masks(Run(run), files, out, degree=degree, overlay=overlay, tiles=tiles)
    )
    failed = False
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, answer in enumerate(answers):
        if number == 0 and form is Format.csv:
            writer.writerow(
                ["path", "class", "probability"] if out is None else ["path", "mask", "share"]
            )
        if isinstance(answer, ImageError):
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
    from tokendial.train.profile import profile as run_profile

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
    from tokendial.atomic import replacing
    from tokendial.data.images import read_image
    from tokendial.show.report import png
    from tokendial.show.tokens import run_diversity_figure, run_figure
    from tokendial.train import Run

    draw = run_diversity_figure if diversity else run_figure
    figure = draw(Run(run), read_image(image), degree=degree, title=image.name)
    if not out.parent.is_dir():
        raise ValueError(f"out: no such folder: {out.parent}.")
    with replacing(out) as path:
        path.write_bytes(png(figure, dpi=150))
    print(f"wrote {out}")


@data.command("check")
def check_data(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Holds images/ and annotations/.")],
    classes: Annotated[
        int | None, typer.Option(min=2, help="Of a semantic segmentation; default: binary masks.")
    ] = None,
    ignore_zero: Annotated[
        bool, typer.Option("--ignore-zero", help="Value 0 is no class, as in ADE20K.")
    ] = False,
    train: Annotated[str, typer.Option(help="Name of the training folders.")] = "training",
    val: Annotated[str, typer.Option(help="Name of the validation folders.")] = "validation",
) -> None:
    """List unpaired and unreadable files, differing sizes and odd values; exit code 1 if any."""
    from tokendial.data.pairs import Pairs, check_pairs

    pairs = Pairs(root=str(root), classes=classes, ignore_zero=ignore_zero, train=train, val=val)
    count = sum(len(pairs.pairs(root, split)[0]) for split in (train, val))
    found = 0
    for problem in check_pairs(pairs, root):
        print(problem)
        found += 1
    print(f"{root}: {count} pairs, {f'{found} problems' if found else 'no problems'}")
    if found:
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
    file: Annotated[Path, typer.Argument(help="DINOv2, DeiT, MAE, DAR (.pth) or AugReg (.npz).")],
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
        from tokendial.train import read_recipe
        from tokendial.train.released import released_run

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


@app.command()
def demo(
    task: Annotated[
        DemoTask, typer.Option(help="counting: Sparse-Tuning and a compensator; masks: DAR.")
    ] = DemoTask.counting,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run and the report; default: demo or demo_masks."),
    ] = None,
) -> None:
    """The whole story in a few minutes, offline: fine-tune the shipped model, turn the dial."""
    from tokendial.demo import run_demo, run_masks_demo

    if task is DemoTask.masks:
        run_masks_demo(out or Path("demo_masks"))
    else:
        run_demo(out or Path("demo"))


if __name__ == "__main__":
    main()
