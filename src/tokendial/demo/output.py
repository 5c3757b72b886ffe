"""Output of the demos: a table on the terminal, PNG files, and the report page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tokendial.atomic import atomic_write
from tokendial.measure import Timing
from tokendial.show.report import Section, png, report_html

_MARK = " ?"


class _Timed(Protocol):
    """A row of a table whose speed was measured."""

    @property
    def timing(self) -> Timing: ...


def speed_cell(row: _Timed, first: _Timed) -> str:
    """How many times as fast a row is as the first one, marked if its times cannot be trusted."""
    speedup = f"{first.timing.seconds / row.timing.seconds:.2f}x"
    return speedup + _MARK * row.timing.disturbed


def note_on_times(rows: Sequence[Sequence[str]]) -> str:
    """A sentence that explains the mark of `speed_cell`; empty if no row has it."""
    if not any(cell.endswith(_MARK) for row in rows for cell in row):
        return ""
    return "A question mark: another program probably used this machine during the measurement."


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, and what is to be noted about its times."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if note := note_on_times(rows):
        console.print(note)


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
