"""Files of one kind, told by their endings, among what a user names."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

_OF_SYSTEMS = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "@recycle", "__macosx", "lost+found"}
    | {"system volume information"}
)
"""Folders, in lower case, that archives, desktops and network drives leave among a user's files."""
_OF_DESKTOPS = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
_LOG = logging.getLogger(__name__)


def of_a_system(name: str) -> bool:
    """Whether a file or folder of this name was put there by a system and not by a user.

    Hidden ones (whose name starts with a dot: `._a.png` of a Mac is no image), and folders such as
    `__MACOSX` and `@eaDir`, which hold copies and previews of the files beside them.
    """
    return name.startswith(".") or name.lower() in _OF_SYSTEMS | _OF_DESKTOPS


def find_files(
    paths: Iterable[str | Path], suffixes: Collection[str], kind: str, error: type[ValueError]
) -> list[Path]:
    """Files among `paths` as they are, and what `files_in` finds in folders.

    Files of other kinds in folders are counted in one logged line.

    Args:
        paths: Files and folders.
        suffixes: Endings to look for in folders, in lower case.
        kind: What such a file is called in messages, such as "image".
        error: What to raise if a path does not exist, or nothing is found.
    """
    searched = list(map(Path, paths))
    found: list[Path] = []
    others: Counter[str] = Counter()
    for path in searched:
        if path.is_dir():
            found += files_in(path, suffixes, others)
        elif path.exists():
            found.append(path)
        else:
            raise error(f"no such {kind} or folder: {path}.")
    where = ", ".join(map(str, searched))
    if not found:
        raise error(f"no {kind}s found in {where}{endings(others, ' (only ', ')')}.")
    warn_of_others(others, kind, where)
    return found


def files_in(
    folder: Path, suffixes: Collection[str], others: Counter[str] | None = None
) -> list[Path]:
    """Files with one of these endings anywhere below `folder`, sorted.

    What systems leave there (`of_a_system`) is passed over.

    Args:
        folder: Where to look.
        suffixes: Endings in lower case.
        others: The endings of all other files are counted here.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not of_a_system(name)]
        for name in names:
            if of_a_system(name):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                found.append(Path(place, name))
            elif others is not None:
                others[suffix] += 1
    return sorted(found)


def warn_of_others(others: Counter[str], kind: str, where: object) -> None:
    """Log in one line how many files of which endings were left out, if there were any."""
    if others:
        left_out = f"{others.total():,} file(s) that are no {kind}s by their endings"
        _LOG.warning("%s: left out %s: %s", where, left_out, endings(others))


def endings(others: Counter[str], before: str = "", after: str = "") -> str:
    """Such as "12 .heic, 3 .txt", the most frequent first; nothing if there are none."""
    told = ", ".join(f"{n:,} {suffix or 'without one'}" for suffix, n in others.most_common(8))
    more = ", ..." if len(others) > 8 else ""
    return f"{before}{told}{more}{after}" if others else ""
