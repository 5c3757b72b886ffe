"""The files that models are loaded from, held open: they can be read when their folder is gone."""

import os
from collections.abc import Mapping
from pathlib import Path

from tokendial.model.files import CONFIG, WEIGHTS

_OPEN = Path("/proc/self/fd")
_SAVED = (CONFIG, WEIGHTS)
_FILES = (
    *("recipe.yaml", "classes.json", "eval/degrees.csv", "eval/bridged.csv"),
    *_SAVED,
    *(f"best/{name}" for name in _SAVED),
)

Links = Mapping[str, str]
"""Where the files of a folder can be read, by their names in it."""


class Kept:
    """Open files of the folder of a run or of a saved model."""

    def __init__(self, folder: Path) -> None:
        """Open what is there, to be read later as it is now.

        A file that another one takes the place of stays as it was; one that is written over does
        not. Nothing is kept where the system does not show open files as paths: only Linux does.
        """
        there = [name for name in _FILES if (folder / name).is_file()] if _OPEN.is_dir() else []
        self._files = {name: (folder / name).open("rb") for name in there}

    @property
    def links(self) -> Links:
        """Where other processes can read them until `close`."""
        own = os.getpid()
        return {name: f"/proc/{own}/fd/{file.fileno()}" for name, file in self._files.items()}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def laid_out(links: Links, folder: Path, into: Path) -> Path:
    """A folder with the files that were kept of another one; that one itself if there are none.

    Args:
        links: Of `Kept`.
        folder: Where they came from.
        into: The folder to make.
    """
    if not links:
        return folder
    for name, target in links.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to(target)
    return into
