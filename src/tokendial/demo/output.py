"""Output of the demos: a table on the terminal, PNG files, and the report page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tokendial.atomic import atomic_write
from tokendial.show.report import Section, png, report_html


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_report(
    console: Console, out: Path, title: str, sections: list[Section], pictures: Mapping[str, Figure]
) -> Path:
    """Write `out/report.html`, and `out/NAME.png` for each picture. Print and return its path."""
    for name, figure in pictures.items():
        with atomic_write(out / f"{name}.png") as path:
            path.write_bytes(png(figure))
    report = out / "report.html"
    with atomic_write(report) as path:
        path.write_text(report_html(title, sections), encoding="utf-8")
    console.print(f"The report: {report.resolve()}", soft_wrap=True, highlight=False)
    return report
