"""Masks: DAR learns to outline items, then the share of patches in the FFNs is turned."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from tokendial.demo.output import print_table, write_report
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

_PICTURES = (0, 1, 2, 3)


def run_masks_demo(out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Run the recipe demo_masks.yaml into `out`, evaluate it along the dial, write a report.

    A demo that was stopped goes on; one that has finished is evaluated anew.

    Args:
        out: Folder for the run and the report.
        overrides: Settings of the recipe to change, such as `train.epochs=1`.

    Returns:
        The path of the report, `out/report.html`.
    """
    recipe = read_recipe("demo_masks", [f"output={out / 'run'}", *overrides])
    console = Console()
    console.print("DAR on a small ViT: outline items, with half of the patches in each FFN.")
    run = train(recipe)
    rows = evaluate(run, batch_size=20)
    cells = [_cells(row, rows[0]) for row in rows]
    print_table(console, _HEADER, cells)
    write_rows(rows, out / "degrees.csv")
    plot = dial_figure(rows, metric="S-measure", title="one model, every degree of the dial")
    val = recipe.data.build(recipe.seed).val
    scenes = [val[number] for number in _PICTURES]
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
        f"{row.images_per_s / first.images_per_s:.2f}x",
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
                f"A 12-block ViT with {cost.params / 1e6:.2f} M parameters, pre-trained on telling "
                f"which kinds of items a picture holds, learnt to outline them: "
                f"{cost.trainable_params / 1e6:.2f} M adapter parameters and a decoder were "
                f"trained (DAR), the backbone stayed frozen. In each block a small convolution "
                f"decides which patches the FFN processes, half of them on average; attention and "
                f"adapters see all. These small pictures show the mechanism; they say nothing "
                f"about scores on large data sets."
            ),
        ),
        Section(
            title="The dial",
            text=(
                f"The model was trained at degree {cost.degree}. The threshold of the decision is "
                f"the dial: lower ones let more patches in, higher ones fewer. Thresholds were "
                f"found on training pictures; the shares are measured on the validation pictures, "
                f"like the scores. The cost is that of the shares of the training pictures."
            ),
            header=_HEADER,
            rows=cells,
            figures=[plot],
        ),
        Section(
            title="Masks",
            text="Probability of an item at each pixel: every patch in every FFN, as trained, few.",
            figures=masks,
        ),
        Section(
            title="Which patches the FFNs processed",
            text="Dark patches passed by the FFN of that layer: attention and adapter only.",
            figures=tokens,
        ),
        Section(title="Recipe", code=recipe.to_yaml()),
    ]
