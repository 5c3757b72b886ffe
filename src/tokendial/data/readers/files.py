"""Files of one kind, told by their endings, among what a user names."""

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

PATH = {"path": True}
"""Metadata of a data set's fields that are paths; relative ones start from the working folder."""
DataT = TypeVar("DataT")
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


def found_from(data: DataT, folder: Path) -> DataT:
    """A data set whose relative paths start from `folder`, as far as something is there.

    Args:
        data: A dataclass; its fields that are paths have the metadata `PATH`.
        folder: Where they are looked up.
    """
    unchecked: Any = data
    changed = {}
    for field in dataclasses.fields(unchecked):
        value = getattr(data, field.name)
        if "path" in field.metadata and value is not None:
            several = isinstance(value, list)
            found = [_joined(folder, path) for path in (value if several else [value])]
            changed[field.name] = found if several else found[0]
    replaced: DataT = dataclasses.replace(unchecked, **changed)
    return replaced


def _joined(folder: Path, path: str) -> str:
    joined = folder / path
    # Shards are named by patterns, in which braces count and list.
    there = joined.exists() or glob(re.sub(r"\{[^{}]*\}", "*", str(joined)))
    return str(joined) if there else path


def shown(path: Path) -> str:
    """A path, and where it was looked up if it is a relative one."""
    return str(path) if path.is_absolute() else f"{path} (looked up in {Path.cwd()})"
