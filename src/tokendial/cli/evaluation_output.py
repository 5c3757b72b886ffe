"""Output of `tokendial eval`: tables on the terminal, CSV files, plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokendial.runs.evaluate import DegreeRow
    from tokendial.runs.evaluate_attached import AttachedRow
    from tokendial.runs.evaluate_cascade import AnsweredRow
    from tokendial.runs.evaluate_compensator import CompensatedRow
    from tokendial.runs.evaluation_tables import EvaluatedRow
    from tokendial.runs.export_int8 import Int8File

_MAX_SCORES, _SHOWN_SCORES = 5, 3
"""Up to 5 metrics are all printed; of more, 3 are. Tasks can have one metric per class; the CSV
file has all."""
_SHOWN_CLASSES = 20
"""Classes in the printed table, those of lowest recall. The CSV file has all."""


def dial_table(rows: "Sequence[DegreeRow]", unit: str) -> Table:
    """Scores, cost and speed at each degree."""
    from tokendial.tasks.metric_titles import metric_title

    shown = _shown_scores(rows[0].scores)
    names = [metric_title(name) for name in shown]
    # Methods that select tokens by threshold skip FFNs only: all tokens leave the last layer.
    tokens = "tokens left" if rows[0].share is None else "tokens processed"
    table = Table("degree", *names, "GMACs", "cost", f"{unit}s/s", "speed", tokens)
    for row in rows:
        table.add_row(
            str(row.degree),
            *(f"{row.scores[name]:.2%}" for name in shown),
            *_cost_and_speed(row, rows[0]),
            str(row.tokens) if row.share is None else f"{row.share:.1%}",
        )
    return table


def cascade_table(rows: "Sequence[AnsweredRow]") -> Table:
    """Scores, cost and speed of a cascade and of degrees beside it, relative to the last row."""
    from tokendial.tasks.metric_titles import metric_title

    shown, last = _shown_scores(rows[0].scores), rows[-1]
    names = [metric_title(name) for name in shown]
    table = Table("degree", *names, "answered early", "GMACs", "cost", "images/s", "speed")
    for row in rows:
        table.add_row(
            row.degrees,
            *(f"{row.scores[name]:.2%}" for name in shown),
            "" if row.early is None else f"{row.early:.1%}",
            *_cost_and_speed(row, last),
        )
    return table


def _shown_scores(scores: dict[str, float]) -> list[str]:
    """Names of the metrics to print."""
    names = list(scores)
    return names if len(names) <= _MAX_SCORES else names[:_SHOWN_SCORES]


def attached_table(rows: "Sequence[AttachedRow]") -> Table:
    """Agreement with degree 0, cost of the ViTs and of the whole call, and speed at each degree."""
    from tokendial.tasks.metric_titles import metric_title

    names = list(rows[0].scores)
    titles = map(metric_title, names)
    table = Table("degree", *titles, "ViT GMACs", "GMACs", "cost", "images/s", "speed")
    for row in rows:
        table.add_row(
            str(row.degree),
            *(f"{row.scores[name]:.2%}" for name in names),
            f"{row.tower_gmacs:.4g}",
            *_cost_and_speed(row, rows[0]),
        )
    return table


def int8_table(files: "Sequence[Int8File]") -> Table:
    """The main metric in float32 and in 8 bits at each degree, and the accuracy lost."""
    from tokendial.tasks.metric_titles import metric_title

    title = metric_title(files[0].metric)
    intervals = [file.accuracy_lost for file in files if file.accuracy_lost is not None]
    table = Table("degree", f"{title}, float32", f"{title}, 8 bits")
    if intervals:
        table.add_column("accuracy lost in points (95 % interval)")
    for index, file in enumerate(files):
        lost = [intervals[index].percent(sign=True)] if intervals else []
        table.add_row(str(file.degree), f"{file.before:.2%}", f"{file.after:.2%}", *lost)
    return table


def _cost_and_speed(
    row: "DegreeRow | AttachedRow | AnsweredRow", whole: "DegreeRow | AttachedRow | AnsweredRow"
) -> list[str]:
    """Cells: GMACs, their share of the whole model's, images per second, and speed."""
    return [
        f"{row.gmacs:.4g}",
        f"{row.gmacs / whole.gmacs:.0%}",
        f"{row.images_per_s:.1f}" if row.images_per_s < 10 else f"{row.images_per_s:.0f}",
        f"{row.speedup:.2f}x" + " ?" * row.disturbed,
    ]


def class_table(rows: "Sequence[DegreeRow]", classes: Sequence[str]) -> Table:
    """Recall and precision at the first and last degree, for the classes of lowest recall."""
    from tokendial.runs.evaluation_tables import class_scores

    first, last = class_scores(rows[0], classes), class_scores(rows[-1], classes)
    several = len(rows) > 1
    table = Table(
        "class",
        "images",
        f"recall at {rows[0].degree}",
        *[f"at {rows[-1].degree}"] * several,
        f"precision at {rows[0].degree}",
        *[f"at {rows[-1].degree}"] * several,
        "most often mistaken for",
        title=f"the {_SHOWN_CLASSES} classes of lowest recall" * (len(classes) > _SHOWN_CLASSES),
    )
    worst = sorted(zip(first, last, strict=True), key=lambda pair: pair[0].recall)
    for at_first, at_last in worst[:_SHOWN_CLASSES]:
        table.add_row(
            at_first.name,
            str(at_first.images),
            _percent(at_first.recall),
            *[_percent(at_last.recall)] * several,
            _percent(at_first.precision),
            *[_percent(at_last.precision)] * several,
            f"{at_first.mistaken_for} ({at_first.times})" if at_first.mistaken_for else "",
        )
    return table


def _percent(fraction: float) -> str:
    """A fraction as text; empty for NaN, where there were no images."""
    return "" if math.isnan(fraction) else f"{fraction:.1%}"


def compensator_table(rows: "Sequence[CompensatedRow]") -> Table:
    """Accuracy without and with the compensator, cost and speed at each degree of each run."""
    table = Table("trained at", "run at", "plain", "compensated", "gain", "GMACs", "images/s")
    for row in rows:
        table.add_row(
            str(row.source),
            str(row.degree),
            f"{row.plain:.2%}",
            f"{row.accuracy:.2%}",
            f"{100 * (row.accuracy - row.plain):+.2f}",
            f"{row.gmacs:.4f}",
            f"{row.images_per_s:.0f}" + " ?" * row.disturbed,
        )
    return table


def warn_if_disturbed(rows: "Sequence[EvaluatedRow]") -> None:
    """Print a line if times are not to be trusted; tables mark such rows with a question mark."""
    if any(row.disturbed for row in rows):
        print(
            "speed: times vary widely, probably because another program used this machine: "
            "measure again"
        )


def write_evaluation(rows: "Sequence[EvaluatedRow]", figure: "Figure", stem: Path) -> None:
    """Write the rows as STEM.csv and their figure as STEM.png, and print the paths."""
    from tokendial.runs.evaluation_tables import write_rows

    table, plot = stem.with_suffix(".csv"), stem.with_suffix(".png")
    write_rows(rows, table)
    write_picture(figure, plot)
    print(f"wrote {table} and {plot}")


def write_picture(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG; its folder is made if it is missing."""
    from tokendial.atomic import atomic_write
    from tokendial.show.report import png

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(png(figure, dpi=150))
