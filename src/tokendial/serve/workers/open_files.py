"""Open files of run folders: models can be loaded again after their folder was deleted."""

import os
from collections.abc import Mapping
from pathlib import Path

from tokendial.model.files import CONFIG, WEIGHTS

_OPEN_FILES = Path("/proc/self/fd")
_SAVED = (CONFIG, WEIGHTS)
_FILES = (
    *("recipe.yaml", "classes.json", "cascade.json", "eval/degrees.csv", "eval/bridged.csv"),
    *_SAVED,
    *(f"best/{name}" for name in _SAVED),
)

FilePaths = Mapping[str, str]
"""Paths under which open files can be read, by their names in the folder."""


class OpenFolder:
    """Open files of a run's or a saved model's folder."""

    def __init__(self, folder: Path) -> None:
        """Open the files that exist.

        A file that is replaced by another one can still be read as it was; a file that is
        overwritten in place cannot. Only Linux shows open files as paths; elsewhere nothing is
        opened.
        """
        exist = _OPEN_FILES.is_dir()
        names = [name for name in _FILES if (folder / name).is_file()] if exist else []
        self._files = {name: (folder / name).open("rb") for name in names}

    @property
    def paths(self) -> FilePaths:
        """Paths under which other processes can read the files until `close`."""
        pid = os.getpid()
        return {name: f"/proc/{pid}/fd/{file.fileno()}" for name, file in self._files.items()}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def link_files(paths: FilePaths, folder: Path, target: Path) -> Path:
    """Create a folder of links to open files, and return it.

    Args:
        paths: Paths of an `OpenFolder`. If there are none, `folder` is returned instead.
        folder: Folder that the files were opened in.
        target: Folder to create.
    """
    if not paths:
        return folder
    for name, path in paths.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(path)
    return target
