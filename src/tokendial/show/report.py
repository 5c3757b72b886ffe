"""Report pages: self-contained HTML with tables, figures and text."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a202c; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
img { max-width: 100%; display: block; margin: .75rem 0; }
pre { background: #f7fafc; padding: .8rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #16191f; color: #e2e8f0; }
  pre { background: #232831; } img { background: #fff; border-radius: 4px; } }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One section of a report page. Parts that are empty are left out."""

    title: str
    """Heading of the section."""
    text: str = ""
    """Text below the heading, without markup. An empty line separates paragraphs."""
    header: tuple[str, ...] = ()
    """Column names of the table. Empty: no table."""
    rows: Sequence[Sequence[str]] = ()
    """Rows of the table."""
    figures: Sequence[matplotlib.figure.Figure] = ()
    """Figures below the table, embedded as PNG."""
    code: str = ""
    """Text in a fixed-width font at the end of the section."""


def report_html(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a page. It needs no other file and no network."""
    body = "".join(_section(section) for section in sections)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def png(figure: matplotlib.figure.Figure, dpi: int = 110) -> bytes:
    """The bytes of a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text.split("\n\n")]
    if section.header:
        rows = [_row(section.header, "th"), *(_row(row, "td") for row in section.rows)]
        parts.append(f"<table>{''.join(rows)}</table>")
    for figure in section.figures:
        data = base64.b64encode(png(figure)).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.code:
        parts.append(f"<pre>{html.escape(section.code)}</pre>")
    return "".join(parts)


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
