"""Writing a table of the evidence: JSON that says how it was made, and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence_real.common import markdown
from benchmarks.report import write_json
from tokendial.atomic import atomic_write
from tokendial.measure import Interval


def write_table(
    name: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    results: Mapping[str, Any],
    figure: Figure | None = None,
) -> None:
    """Print a table, and write evidence_real_NAME_HARDWARE_DATE.json, .md and, if drawn, .png.

    Args:
        name: Name of the table.
        header: Titles of its columns.
        rows: Its cells.
        results: The numbers behind it, for the JSON file.
        figure: A plot of them.
    """
    text = markdown(header, rows)
    print(text)
    path = write_json(f"evidence_real_{name}", results)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(text + "\n")
    if figure is not None:
        with atomic_write(path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def plain(value: Any) -> Any:
    """Intervals, and lists and mappings that hold them, as JSON can store them."""
    if isinstance(value, Interval):
        return asdict(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
