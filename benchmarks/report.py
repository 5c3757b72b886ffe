"""Results of a benchmark: JSON that says how they were made, a Markdown table, and a plot."""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import hardware
from tokendial.atomic import atomic_write

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of a report."""

    key: str
    """Key of the value in a row."""
    title: str
    """Name of the column."""
    form: str = "{}"
    """Format of the value. `{low}` and `{high}` stand for KEY_low and KEY_high of the row."""

    def cell(self, row: Row) -> str:
        """The value in a row as text; a dash for None."""
        value = row[self.key]
        if value is None:
            return "-"
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        return self.form.format(value, low=low, high=high)


@dataclass(frozen=True)
class Report:
    """The results of a benchmark."""

    name: str
    """Start of the names of the files."""
    columns: Sequence[Column]
    """Columns of the table."""
    rows: Sequence[Row]
    """Rows of the table, which may hold more values than the columns show."""
    figure: Figure
    """The plot."""
    notes: Sequence[str] = ()
    """Lines below the table."""

    def write(self, options: argparse.Namespace) -> None:
        """Print the table, and write NAME_HARDWARE_DATE.json, .md and .png."""
        page = [f"# {self.name}", "", f"{hardware.one_line(options.device)}.", "", *self.table()]
        page += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        page += ["", f"    {command()}"]
        print("\n".join(page))
        results = {"notes": list(self.notes), "rows": list(self.rows)}
        path = write_json(self.name, results, device=options.device, out=options.out)
        with atomic_write(path.with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(page) + "\n")
        with atomic_write(path.with_suffix(".png")) as temporary:
            self.figure.savefig(temporary, format="png", dpi=120)

    def table(self) -> list[str]:
        """The lines of the table as Markdown."""
        lines = [[column.title for column in self.columns], ["---"] * len(self.columns)]
        lines += [[column.cell(row) for column in self.columns] for row in self.rows]
        return ["| " + " | ".join(line) + " |" for line in lines]


def write_json(
    name: str, results: Mapping[str, Any], *, device: str = "cpu", out: Path | None = None
) -> Path:
    """Write NAME_HARDWARE_DATE.json: the results, and how they were made. Returns its path."""
    now = datetime.datetime.now(tz=datetime.UTC)
    made = {
        "command": command(),
        "made": now.isoformat(timespec="seconds"),
        "hardware": hardware.describe(device),
        "versions": hardware.versions(),
    }
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{hardware.slug(device)}_{now:%Y%m%d}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(made | dict(results), indent=2) + "\n")
    print(f"wrote {path}")
    return path


def command() -> str:
    """The command line that made the results."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
