"""Results of a command: JSON with how they were made, a table in Markdown, and a plot."""

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
    """How a value of the rows is shown."""

    key: str
    title: str
    form: str = "{}"
    """Format of the value; `{low}` and `{high}` are those of the row, named KEY_low, KEY_high."""

    def cell(self, row: Row) -> str:
        """The value of a row as text; a dash where there is none."""
        value = row[self.key]
        if value is None:
            return "-"
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        return self.form.format(value, low=low, high=high)


@dataclass(frozen=True)
class Report:
    """What a command found."""

    name: str
    """Of the files."""
    columns: Sequence[Column]
    rows: Sequence[Row]
    figure: Figure
    notes: Sequence[str] = ()
    """Lines under the table."""

    def write(self, options: argparse.Namespace) -> None:
        """Print the table, and write NAME_HARDWARE_DATE.json, .md and .png."""
        page = [f"# {self.name}", "", f"{hardware.in_words(options.device)}.", "", *self.table()]
        page += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        page += ["", f"    {command()}"]
        print("\n".join(page))
        found = {"notes": list(self.notes), "rows": list(self.rows)}
        path = write_json(self.name, found, device=options.device, out=options.out)
        with atomic_write(path.with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(page) + "\n")
        with atomic_write(path.with_suffix(".png")) as temporary:
            self.figure.savefig(temporary, format="png", dpi=120)

    def table(self) -> list[str]:
        """The rows in Markdown."""
        lines = [[column.title for column in self.columns], ["---"] * len(self.columns)]
        lines += [[column.cell(row) for column in self.columns] for row in self.rows]
        return ["| " + " | ".join(line) + " |" for line in lines]


def write_json(
    name: str, found: Mapping[str, Any], *, device: str = "cpu", out: Path | None = None
) -> Path:
    """Write NAME_HARDWARE_DATE.json: what was found and how it was made."""
    now = datetime.datetime.now(tz=datetime.UTC)
    made = {
        "command": command(),
        "made": now.isoformat(timespec="seconds"),
        "hardware": hardware.described(device),
        "versions": hardware.versions(),
    }
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{hardware.in_a_name(device)}_{now:%Y%m%d}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(made | dict(found), indent=2) + "\n")
    print(f"wrote {path}")
    return path


def command() -> str:
    """The command line that made the results."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
