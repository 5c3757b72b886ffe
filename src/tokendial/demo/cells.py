"""The solar-cell demo: a real pre-trained model learns a real inspection task, then its dial turns.

Everything is measured on test cells that no training saw, and no setting is chosen by them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tokendial.compensate import Compensator
from tokendial.demo.cells_data import find_or_fetch
from tokendial.demo.cells_report import dial_table, report_sections
from tokendial.demo.cells_results import CellsResults, FittedSchedule, five_rows
from tokendial.demo.cells_scores import (
    CellRow,
    Cells,
    answers,
    defect_probability,
    read_cells,
    rows_of_dial,
    write_cells_csv,
)
from tokendial.demo.output import print_table, write_report
from tokendial.measure import time_in_rounds
from tokendial.runs.device import default_device
from tokendial.runs.fit import fit_run
from tokendial.runs.recipe import CompensateRecipe, Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.train.compensator_training import compensate
from tokendial.train.fine_tuning import train
from tokendial.tune import Precision

_DEGREES = 9
"""Number of degrees to show: 0, the trained one in the middle, and others up to its double."""
_FIT_MINUTES, _FULL_FIT_MINUTES = 2.0, 5.0


def run_cells_demo(out: Path, overrides: tuple[str, ...] = (), *, full: bool = False) -> Path:
    """Fine-tune DINOv2 on solar cells, measure every degree of its dial, and write a report.

    The weights and the pictures are downloaded into `out`, unless they are there or installed. A
    demo that was interrupted is resumed. One that is finished is measured again.

    Args:
        out: Folder for the downloads, the runs and the report.
        overrides: Fields of the recipe to change, such as `train.epochs=1`.
        full: Whether to train at 224 pixels instead of 112: better, and five times as long.

    Returns:
        The path of the report, `out/report.html`.

    Raises:
        ValueError: If the weights or the pictures cannot be downloaded.
    """
    console = Console()
    console.print("1/5 The weights of DINOv2 and the pictures of solar cells")
    weights, root = find_or_fetch(out)
    recipe = read_recipe(
        "demo_cells_full" if full else "demo_cells",
        [
            f"output={out / 'run'}",
            f"model.weights={weights}",
            *([f"data.root={root}"] if root else []),
            f"train.precision={_precision(Run(out / 'run'))}",
            *overrides,
        ],
    )
    console.print("2/5 Training the model to tell defective cells from sound ones")
    run = train(recipe)
    console.print("3/5 Running it on test cells at each degree of the dial")
    model = run.model().to(default_device())
    cells = read_cells(run, model)
    rows = rows_of_dial(model, cells, _degrees(model.degree, model.degrees[-1]))
    print_table(console, *dial_table(rows, balanced=False))
    write_cells_csv(rows, out / "degrees.csv")
    console.print("4/5 Training a compensator on cells without their labels")
    compensated = _compensated_answers(run, out, cells, rows)
    console.print("5/5 Fitting a schedule to the compute of the highest degree")
    fitted = _fit(run, out, cells, rows[-1], _FULL_FIT_MINUTES if full else _FIT_MINUTES)
    sections, figures = report_sections(CellsResults(run, cells, rows, compensated, fitted))
    title = "Tokendial: one model that inspects solar cells, at many speeds"
    return write_report(console, out, title, sections, figures)


def _precision(run: Run) -> Precision:
    """The precision to train with: that of a run that is there, else the faster one here."""
    if run.recipe_file.is_file():
        return run.recipe().train.precision
    device = torch.device(default_device())
    layer = torch.nn.Linear(384, 1536, device=device)
    tokens = torch.randn(32 * 65, 384, device=device)
    choices: tuple[Precision, ...] = ("fp32", "bf16")

    def multiply(precision: Precision) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            layer(tokens).sum().backward()

    timings = time_in_rounds(
        choices, lambda precision: precision, multiply, device=device, seconds=0.1
    )
    return min(zip(timings, choices, strict=True), key=lambda pair: pair[0].seconds)[1]


def _degrees(trained: int, highest: int) -> list[int]:
    """Degrees to show: from 0 over the trained one to its double, if the dial goes that far."""
    last = min(2 * trained, highest)
    return list(range(0, last + 1, max(1, last // (_DEGREES - 1))))


def _compensated_answers(
    run: Run, out: Path, cells: Cells, rows: Sequence[CellRow]
) -> dict[int, torch.Tensor]:
    """Whether the model is right on each test cell with a compensator, at some degrees."""
    trained = compensate(_compensator_recipe(run.recipe(), out, rows[-1].degree))
    compensator = Compensator.from_pretrained(trained.best).to(default_device())
    model = run.model().to(default_device())
    compensator.attach(model, source=model.degree)
    degrees = [row.degree for row in five_rows(rows)]
    return {at: answers(defect_probability(model, cells, at), cells) for at in degrees}


def _compensator_recipe(recipe: Recipe, out: Path, steps: int) -> CompensateRecipe:
    """The recipe of the compensator: model, reduction and data are those of the fine-tuning."""
    fields = recipe.model_dump(mode="json")
    shared = [f"{section}={json.dumps(fields[section])}" for section in ("model", "reduce", "data")]
    return read_recipe(
        "demo_cells_tocom",
        [
            f"output={out / 'compensator'}",
            f"steps={steps}",
            f"train.precision={recipe.train.precision}",
            *shared,
        ],
        kind=CompensateRecipe,
    )


def _fit(run: Run, out: Path, cells: Cells, row: CellRow, minutes: float) -> FittedSchedule:
    """A schedule that computes no more than a degree of the dial, and how right the model is."""
    # Compute is counted, so a busy machine leaves the search its time. The factor keeps rounding
    # from excluding the degree itself.
    budgets = {"gmacs": [row.gmacs * (1 + 1e-6)]}
    result = fit_run(run, out / "fitted", budgets, minutes=minutes)
    model = run.model(result.reduce).to(default_device())
    return FittedSchedule(
        images=result.images,
        found=result.degrees[0].found,
        right=answers(defect_probability(model, cells, 1), cells),
    )
