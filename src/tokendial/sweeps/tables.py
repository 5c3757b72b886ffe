"""Tables of results as Markdown, LaTeX and CSV."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tokendial.atomic import atomic_write

_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "→": r"$\to$"}
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text."""

    title: str
    """Heading of the table."""
    note: str
    """Paragraph below the heading, which explains the table."""
    header: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[str]]
    """Cells of each row, as many as the header has."""

    def transposed(self) -> "Table":
        """The table with rows and columns exchanged."""
        header, *rows = zip(self.header, *self.rows, strict=True)
        return Table(self.title, self.note, header, rows)

    def markdown(self) -> str:
        """The table as Markdown, aligned so that it can be read as plain text, too."""
        lines = [[cell.replace("|", r"\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        # The first column holds names, aligned left; numbers are aligned right.
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        text = "\n".join(
            "| "
            + " | ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            + " |"
            for line in (lines[0], rule, *lines[1:])
        )
        return f"## {self.title}\n\n{self.note}\n\n{text}\n"

    def latex(self) -> str:
        r"""The table as a LaTeX `tabular` with the rules of booktabs."""
        first, *rows = (
            " & ".join(cell.translate(_LATEX) for cell in row) + r" \\"
            for row in (self.header, *self.rows)
        )
        body = "\n".join([r"\toprule", first, r"\midrule", *rows, r"\bottomrule"])
        columns = "l" + "r" * (len(self.header) - 1)
        return (
            f"% {self.title}. {self.note}\n"
            f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"
        )


def plain_text(value: str) -> str:
    """A JSON value as text for people: strings lose their quotes."""
    parsed = json.loads(value)
    return parsed if isinstance(parsed, str) else value


def mean_and_std(values: Sequence[float], scale: float = 100.0) -> str:
    """Mean and sample standard deviation as text, such as "81.23 ± 0.45"; or the only value."""
    text = f"{scale * mean(values):.2f}"
    return f"{text} ± {scale * stdev(values):.2f}" if len(values) > 1 else text


def write_text(path: Path, parts: Sequence[str]) -> None:
    """Write tables to a file, one below the other."""
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV. The columns are the union of the keys of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
