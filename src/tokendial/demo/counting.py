"""Counting: fine-tune the shipped model, turn the dial with and without its compensator."""

from importlib.resources import as_file, files
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from tokendial.compensate import Compensator
from tokendial.demo.output import print_table, write_report
from tokendial.runs.evaluate_compensator import CompensatedRow, evaluate_compensator
from tokendial.runs.evaluation_tables import write_rows
from tokendial.runs.recipe import Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.show.plots import bridged_figure
from tokendial.show.report import Section
from tokendial.show.token_figures import run_figure
from tokendial.train.fine_tuning import train

_PICTURES = (0, 1)


def run_demo(out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Run the recipe demo.yaml into `out`, evaluate it along the dial, write `out/report.html`.

    A demo that was stopped goes on; one that has finished is evaluated anew.

    Args:
        out: Folder for the run and the report.
        overrides: Settings of the recipe to change, such as `train.epochs=1`.

    Returns:
        The path of the report.
    """
    recipe = read_recipe("demo", [f"output={out / 'run'}", *overrides])
    console = Console()
    console.print("Sparse-Tuning a small ViT to count sneakers in crowded pictures, then the dial.")
    run = train(recipe)
    with as_file(files("tokendial") / "assets" / "scenes_tocom") as folder:
        compensator = Compensator.from_pretrained(folder)
    rows = evaluate_compensator([run], compensator)
    cells = [_cells(row, rows[0]) for row in rows]
    print_table(console, _HEADER, cells)
    write_rows(rows, out / "degrees.csv")
    plot = bridged_figure(rows, title="one model, every degree of the dial")
    middle, end = rows[len(rows) // 2].degree, rows[-1].degree
    pictures = [
        run_figure(run, image, degree=degree, title=f"scene {number + 1}")
        for number, image in enumerate(_scenes(recipe))
        for degree in (middle, end)
    ]
    return write_report(
        console,
        out,
        "Tokendial demo: one model, any cost",
        _sections(run, recipe, cells, plot, pictures),
        {"dial": plot, "tokens": pictures[0]},
    )


def _scenes(recipe: Recipe) -> list[Image.Image]:
    val = recipe.data.build(recipe.seed).val
    return [val[number][0] for number in _PICTURES]


def _cells(row: CompensatedRow, first: CompensatedRow) -> tuple[str, ...]:
    return (
        str(row.degree),
        f"{row.plain:.1%}",
        f"{row.accuracy:.1%}",
        f"{1000 * row.gmacs:.1f}",
        f"{row.gmacs / first.gmacs:.0%}",
        f"{row.images_per_s:.0f}",
        f"{row.images_per_s / first.images_per_s:.2f}x",
        str(row.tokens),
    )


_HEADER = (
    "degree",
    "accuracy",
    "with ToCom",
    "MMACs",
    "cost",
    "images/s",
    "speed",
    "tokens left",
)


def _sections(
    run: Run, recipe: Recipe, cells: list[tuple[str, ...]], plot: Figure, pictures: list[Figure]
) -> list[Section]:
    trained = run.model().cost()
    return [
        Section(
            title="What happened",
            text=(
                f"A 12-block ViT with {trained.params / 1e6:.2f} M parameters, pre-trained on "
                f"telling which kinds of items a picture holds, learnt another question: how many "
                f"sneakers are there? {trained.trainable_params / 1e6:.3f} M adapter parameters "
                f"and a head were trained (Sparse-Tuning: EViT at layers 4, 7 and 10, keep rate "
                f"0.7, with Dense Adapters); the backbone stayed frozen. Then the dial was turned "
                f"through every degree without training again. These small pictures show the "
                f"mechanism; they say nothing about accuracies on large data sets."
            ),
        ),
        Section(
            title="The dial",
            text=(
                "Degree 0 keeps every token; degree d keeps a share 1 - d/10 at three layers. The "
                "model was trained at degree 3. With ToCom, the shipped compensator turns with the "
                "dial: small differences in queries and values that were learnt once, on the "
                "pre-trained model and without labels, and that know nothing of this task. They "
                "are merged into the weights, so they cost nothing."
            ),
            header=_HEADER,
            rows=cells,
            figures=[plot],
        ),
        Section(
            title="Tokens",
            text=(
                "Patches of one token are filled with their mean colour; the other patches that "
                "the class token attends to least are fused into one token."
            ),
            figures=pictures,
        ),
        Section(title="Recipe", code=recipe.to_yaml()),
    ]
