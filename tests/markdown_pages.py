"""The project's pages: their code blocks, links and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
PAGES = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_HEADING = re.compile(r"^#+ +(.+?)(?: *\{#([\w-]+)\})?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    language: str
    """Language after the fence, such as python; empty for indented blocks."""
    code: str
    line: int
    """Line of the page at which the code begins, counted from 1."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Fenced and indented code blocks, in order."""
    text = page.read_text()
    found = [
        Block(page, m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1)
        for m in _FENCE.finditer(text)
    ]
    # Same length, so that lines are counted alike.
    rest = _FENCE.sub(lambda m: re.sub(r"[^\n]", "x", m[0]), text)
    for match in _INDENTED.finditer(rest):
        code = re.sub(r"^ {4}", "", match[1], flags=re.MULTILINE)
        found.append(Block(page, "", code, rest.count("\n", 0, match.start()) + 1))
    return sorted(found, key=lambda block: block.line)


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures, code left out."""
    text = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text()))
    return _LINK.findall(text)


def anchors_of(page: Path) -> set[str]:
    """Anchors that links may name after a #: those of Markdown's toc extension and of GitHub."""
    text = _FENCE.sub("", page.read_text())
    return {name or _slug(heading) for heading, name in _HEADING.findall(text)}


def _slug(heading: str) -> str:
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[\s]+", "-", plain)
