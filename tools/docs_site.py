"""What mkdocs.yml asks for while it builds the site."""

import re
from typing import Any

_SOURCE = re.compile(r"\[[^\]]*\]\(\.\./((?:src|recipes|tools)/[^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name source files that a page links to: they are part of the checkout, not of the site."""
    return _SOURCE.sub(r"`\1`", markdown)
