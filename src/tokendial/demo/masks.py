"""The mask demo: DAR learns to outline items, then runs with more and fewer patches in FFNs."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from tokendial.demo.output import note_on_times, print_table, speed_cell, write_report
from tokendial.runs.evaluate import DegreeRow, evaluate
from tokendial.runs.evaluation_tables import write_rows
from tokendial.runs.recipe import Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.show.masks import run_mask_figure
from tokendial.show.plots import dial_figure
from tokendial.show.report import Section
from tokendial.show.token_figures import run_figure
from tokendial.train.fine_tuning import train

_SHOWN_SCENES = (0, 1, 2, 3)


def run_masks_demo(out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Train the recipe demo_masks.yaml, evaluate it at every degree, and write a report.

    A demo that was interrupted is resumed. One that is finished is evaluated again.

    Args:
        out: Folder for the run and the report.
        overrides: Fields of the recipe to change, such as `train.epochs=1`.

    Returns:
        The path of the report, `out/report.html`.
    """
    recipe = read_recipe("demo_masks", [f"output={out / 'run'}", *overrides])
    console = Console()
    console.print(
        "Training a small ViT with DAR to outline items, with half of the patches in each FFN."
    )
    run = train(recipe)
    rows = evaluate(run, batch_size=20)
    cells = [_cells(row, rows[0]) for row in rows]
    print_table(console, _HEADER, cells)
    write_rows(rows, out / "degrees.csv")
    plot = dial_figure(rows, metric="S-measure", title="one model at every degree of the dial")
    val = recipe.data.build(recipe.seed).val
    scenes = [val[number] for number in _SHOWN_SCENES]
    trained = run.model().degree
    degrees = (0, trained, rows[-1].degree)
    masks = [run_mask_figure(run, image, mask, degrees) for image, mask in scenes]
    tokens = [run_figure(run, scenes[0][0], degree=at, title="scene 1") for at in degrees[1:]]
    return write_report(
        console,
        out,
        "Tokendial demo: masks with half of the patches",
        _sections(run, recipe, cells, plot, masks, tokens),
        {"dial": plot, "masks": masks[0], "tokens": tokens[0]},
    )


_HEADER = (
    "degree",
    "patches in FFNs",
    "S-measure",
    "mean F",
    "error",
    "MMACs",
    "cost",
    "images/s",
    "speed",
)


def _cells(row: DegreeRow, first: DegreeRow) -> tuple[str, ...]:
    return (
        str(row.degree),
        f"{row.share:.1%}",
        f"{row.scores['s_measure']:.1%}",
        f"{row.scores['mean_f']:.1%}",
        f"{row.scores['mae']:.1%}",
        f"{1000 * row.gmacs:.0f}",
        f"{row.gmacs / first.gmacs:.0%}",
        f"{row.images_per_s:.0f}",
        speed_cell(row, first),
    )


def _sections(
    run: Run,
    recipe: Recipe,
    cells: list[tuple[str, ...]],
    plot: Figure,
    masks: list[Figure],
    tokens: list[Figure],
) -> list[Section]:
    cost = run.model().cost()
    return [
        Section(
            title="What happened",
            text=(
                f"A ViT with 12 blocks and {cost.params / 1e6:.2f} M parameters was pre-trained to "
                f"recognise which kinds of items an image shows. It was then fine-tuned with DAR "
                f"to outline them: {cost.trainable_params / 1e6:.2f} M adapter parameters and a "
                f"decoder were trained; the backbone stayed frozen. In each block a small "
                f"convolution selects the patches that the FFN processes, half of them on "
                f"average. Attention and adapters process all patches. These small images show "
                f"how it works. They do not show which scores to expect on large data sets."
            ),
        ),
        Section(
            title="The dial",
            text=(
                f"The model was trained at degree {cost.degree}. The dial moves the threshold that "
                f"selects patches: a higher degree has a higher threshold, so FFNs process fewer "
                f"patches. The thresholds were found on training images. The fractions of patches "
                f"and the scores are measured on validation images; the cost counts the fractions "
                f"of the training images. {note_on_times(cells)}"
            ),
            header=_HEADER,
            rows=cells,
            figures=[plot],
        ),
        Section(
            title="Masks",
            text=(
                "Probability of an item at each pixel, at degree 0 (all patches in every FFN), at "
                "the trained degree, and at the highest degree (the fewest patches)."
            ),
            figures=masks,
        ),
        Section(
            title="Which patches the FFNs processed",
            text="Dark patches skipped the FFN of that layer, but not attention and adapter.",
            figures=tokens,
        ),
        Section(title="Recipe", code=recipe.to_yaml()),
    ]
