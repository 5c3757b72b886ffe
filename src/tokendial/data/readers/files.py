"""Find files by their endings, resolve the paths of a data set, and word messages about files."""

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
"""Field metadata that marks a setting as a path; relative paths start in the working directory."""
DataT = TypeVar("DataT")
_SYSTEM_FOLDERS = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "@recycle", "__macosx", "lost+found"}
    | {"system volume information"}
)
"""Folders, in lower case, that archives, desktops and network drives leave among a user's files."""
_SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
_MAX_LISTED_SUFFIXES = 8
_LOG = logging.getLogger(__name__)


def is_system_name(name: str) -> bool:
    """Return whether the system, not the user, made the file or folder of this name.

    That is so for hidden files (their name starts with a dot, such as `._a.png` on a Mac) and for
    folders such as `__MACOSX` and `@eaDir`, which hold copies and previews of the user's files.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS | _SYSTEM_FILES


def find_files(
    paths: Iterable[str | Path], suffixes: Collection[str], kind: str, error: type[ValueError]
) -> list[Path]:
    """Return the files named in `paths` and the files of one kind in the folders named there.

    Folders are searched recursively. One logged line counts the files of other kinds in them.

    Args:
        paths: Files and folders. Files are returned whatever their ending.
        suffixes: Endings to look for in folders, in lower case.
        kind: Noun for such a file in messages, such as "image".
        error: Exception to raise if a path does not exist or no file is found.
    """
    searched = list(map(Path, paths))
    found: list[Path] = []
    other_suffixes: Counter[str] = Counter()
    for path in searched:
        if path.is_dir():
            found += list_files(path, suffixes, other_suffixes)
        elif path.exists():
            found.append(path)
        else:
            raise error(f"no such {kind} or folder: {path}.")
    where = ", ".join(map(str, searched))
    if not found:
        only = f" (only {format_suffixes(other_suffixes)})" if other_suffixes else ""
        raise error(f"no {kind}s found in {where}{only}.")
    warn_of_other_files(other_suffixes, kind, where)
    return found


def list_files(
    folder: Path, suffixes: Collection[str], other_suffixes: Counter[str] | None = None
) -> list[Path]:
    """Return the files below `folder` that have one of the endings, sorted by path.

    Files and folders that the system made (`is_system_name`) are skipped.

    Args:
        folder: Folder to search recursively.
        suffixes: Endings in lower case.
        other_suffixes: Counter to which the endings of all other files are added.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_name(name)]
        for name in names:
            if is_system_name(name):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                found.append(Path(parent, name))
            elif other_suffixes is not None:
                other_suffixes[suffix] += 1
    return sorted(found)


def warn_of_other_files(other_suffixes: Counter[str], kind: str, where: object) -> None:
    """Log in one line how many files were left out because their ending is not one of `kind`."""
    if other_suffixes:
        files = format_count(other_suffixes.total(), "file")
        suffixes = format_suffixes(other_suffixes)
        _LOG.warning("%s: left out %s without %s endings: %s", where, files, kind, suffixes)


def format_suffixes(counts: Counter[str]) -> str:
    """Return counted endings such as "12 .heic, 3 .txt", the most frequent first."""
    most_common = counts.most_common(_MAX_LISTED_SUFFIXES)
    listed = ", ".join(f"{number:,} {suffix or 'without one'}" for suffix, number in most_common)
    return listed + (", ..." if len(counts) > _MAX_LISTED_SUFFIXES else "")


def format_count(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 problem", "1,200 problems" or "2 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def format_more(number: int, noun: str) -> str:
    """Return " (and 1 more problem)" or " (and 3 more problems)"; an empty string for 0."""
    return f" (and {format_count(number, f'more {noun}')})" if number else ""


def resolve_paths(data: DataT, folder: Path) -> DataT:
    """Return a data set whose relative paths are joined to `folder` where that leads to a file.

    Args:
        data: Dataclass whose path fields have the metadata `PATH`.
        folder: Folder in which relative paths are looked up. A path that does not exist there
            stays as it is.
    """
    unchecked: Any = data
    changed = {}
    for field in dataclasses.fields(unchecked):
        value = getattr(data, field.name)
        if "path" in field.metadata and value is not None:
            is_list = isinstance(value, list)
            resolved = [_resolve(folder, path) for path in (value if is_list else [value])]
            changed[field.name] = resolved if is_list else resolved[0]
    replaced: DataT = dataclasses.replace(unchecked, **changed)
    return replaced


def _resolve(folder: Path, path: str) -> str:
    joined = folder / path
    # Shards are named by patterns, in which braces count and list.
    exists = joined.exists() or glob(re.sub(r"\{[^{}]*\}", "*", str(joined)))
    return str(joined) if exists else path


def format_path(path: Path) -> str:
    """Return a path for a message; a relative path is followed by the folder it starts from."""
    return str(path) if path.is_absolute() else f"{path} (looked up in {Path.cwd()})"
