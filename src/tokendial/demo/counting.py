"""The counting demo: Sparse-Tuning of the shipped model, and the dial with its compensator."""

from importlib.resources import as_file, files
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from tokendial.compensate import Compensator
from tokendial.demo.output import note_on_times, print_table, speed_cell, write_report
from tokendial.runs.evaluate_compensator import CompensatedRow, evaluate_compensator
from tokendial.runs.evaluation_tables import write_rows
from tokendial.runs.recipe import Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.show.plots import compensator_figure
from tokendial.show.report import Section
from tokendial.show.token_figures import run_figure
from tokendial.train.fine_tuning import train

_SHOWN_SCENES = (0, 1)


def run_demo(out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Train the recipe demo.yaml, evaluate it at every degree, and write a report.

    A demo that was interrupted is resumed. One that is finished is evaluated again.

    Args:
        out: Folder for the run and the report.
        overrides: Fields of the recipe to change, such as `train.epochs=1`.

    Returns:
        The path of the report, `out/report.html`.
    """
    recipe = read_recipe("demo", [f"output={out / 'run'}", *overrides])
    console = Console()
    console.print(
        "Sparse-Tuning a small ViT to count the sneakers in an image. Then it runs at every degree."
    )
    run = train(recipe)
    with as_file(files("tokendial") / "assets" / "scenes_tocom") as folder:
        compensator = Compensator.from_pretrained(folder)
    rows = evaluate_compensator([run], compensator)
    cells = [_cells(row, rows[0]) for row in rows]
    print_table(console, _HEADER, cells)
    write_rows(rows, out / "degrees.csv")
    plot = compensator_figure(rows, title="one model at every degree of the dial")
    middle, end = rows[len(rows) // 2].degree, rows[-1].degree
    pictures = [
        run_figure(run, image, degree=degree, title=f"scene {number + 1}")
        for number, image in enumerate(_scenes(recipe))
        for degree in (middle, end)
    ]
    report = write_report(
        console,
        out,
        "Tokendial demo: one fine-tuned model at every degree",
        _sections(run, recipe, cells, plot, pictures),
        {"dial": plot, "tokens": pictures[0]},
    )
    console.print(
        "A real model on real pictures (downloads 180 MB): tokendial demo --task cells",
        soft_wrap=True,
        highlight=False,
    )
    return report


def _scenes(recipe: Recipe) -> list[Image.Image]:
    val = recipe.data.build(recipe.seed).val
    return [val[number][0] for number in _SHOWN_SCENES]


def _cells(row: CompensatedRow, first: CompensatedRow) -> tuple[str, ...]:
    return (
        str(row.degree),
        f"{row.plain:.1%}",
        f"{row.accuracy:.1%}",
        f"{1000 * row.gmacs:.1f}",
        f"{row.gmacs / first.gmacs:.0%}",
        f"{row.images_per_s:.0f}",
        speed_cell(row, first),
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
                f"A ViT with 12 blocks and {trained.params / 1e6:.2f} M parameters was pre-trained "
                f"to recognise which kinds of items an image shows. It was then fine-tuned for "
                f"another task: to count the sneakers. The fine-tuning method is Sparse-Tuning: "
                f"EViT at layers 4, 7 and 10 with keep rate 0.7, and Dense Adapters. It trained "
                f"{trained.trainable_params / 1e6:.3f} M adapter parameters and a head; the "
                f"backbone stayed frozen. Then the model ran at every degree of the dial, without "
                f"further training. These small images show how it works. They do not show which "
                f"accuracy to expect on large data sets."
            ),
        ),
        Section(
            title="The dial",
            text=(
                "Degree 0 keeps every token. Degree d keeps the fraction 1 - d/10 of the patch "
                "tokens at each of three layers. The model was trained at degree 3. With ToCom, a "
                "compensator changes queries and values to suit the degree. It was trained once, "
                "on the pre-trained model and without labels, so it knows nothing of this task. "
                "Its weights are merged into the model's, so it takes no time. "
                + note_on_times(cells)
            ),
            header=_HEADER,
            rows=cells,
            figures=[plot],
        ),
        Section(
            title="Tokens",
            text=(
                "At each reducing layer, the patches that the class token attends to least are "
                "fused into one token: the patches with a white outline and their mean colour. The "
                "other patches are tokens of their own."
            ),
            figures=pictures,
        ),
        Section(title="Recipe", code=recipe.to_yaml()),
    ]
