"""Files of one kind, told by their endings, among what a user names."""

from collections.abc import Collection, Iterable
from pathlib import Path


def find_files(
    paths: Iterable[str | Path], suffixes: Collection[str], kind: str, error: type[ValueError]
) -> list[Path]:
    """Files among `paths` as they are, and what `files_in` finds in folders.

    Args:
        paths: Files and folders.
        suffixes: Endings to look for in folders, in lower case.
        kind: What such a file is called in messages, such as "image".
        error: What to raise if a path does not exist, or nothing is found.
    """
    searched = list(map(Path, paths))
    found: list[Path] = []
    for path in searched:
        if path.is_dir():
            found += files_in(path, suffixes)
        elif path.exists():
            found.append(path)
        else:
            raise error(f"no such {kind} or folder: {path}.")
    if not found:
        raise error(f"no {kind}s found in {', '.join(map(str, searched))}.")
    return found


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files with one of these endings anywhere below `folder`, sorted."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
