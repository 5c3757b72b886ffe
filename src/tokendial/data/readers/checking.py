"""Reading every image of a set before a run begins, and remembering which ones are whole."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import ImageError, check_image, count_pictures, warn_of_several
from tokendial.data.readers.pixels import ValueRange

_AT_ONCE = 1024
"""Files that are given to the threads together: an interruption waits for these alone."""
_MOST_THREADS = 16
"""Each holds a whole image, which can take a gigabyte."""
_FIRST_LINE_S, _LINE_EVERY_S = 5.0, 30.0
_VERSION = f"1 Pillow {PIL.__version__}"
"""Of what is remembered: another version of Pillow may refuse what this one reads."""
_LOG = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What reading a file has shown."""

    problem: str | None
    """One line that names the file, if it cannot be read."""
    pictures: int
    """How many pictures it holds."""


def broken_images(
    root: Path, files: Sequence[Path], value_range: ValueRange = None
) -> dict[Path, str]:
    """One line about each file that cannot be read as an image.

    Every file is decoded, in threads. Those that are whole are remembered by size and times of
    change (in ~/.cache/tokendial, or what TOKENDIAL_CACHE names), so that the next run reads only
    what is new or has changed. Of several processes that check the same folder, one reads and the
    others wait for it. Files of several pictures are told of in one logged line, and how far a long
    check has come in one every half minute.

    Args:
        root: Folder that the files lie in.
        files: Image files below it.
        value_range: What is black and white in files of more than 8 bits, see `data.pixels`.
    """
    cache = _cache_file(root, value_range)
    with _alone(cache):
        known = _load(cache)
        stamps = {path: stamp for path in files if (stamp := _stamp(path))}
        names = {path: str(path.relative_to(root)) for path in files}
        todo = [path for path in files if known.get(names[path], [])[:3] != stamps.get(path)]
        found: dict[Path, Seen] = {}
        try:
            for path, seen in _check(root, todo, value_range):
                found[path] = seen
        finally:
            fresh = {
                names[path]: [*stamps[path], seen.pictures]
                for path, seen in found.items()
                if seen.problem is None and path in stamps
            }
            if fresh:
                known |= fresh
                _save(cache, known)
    warn_of_several((path, known[names[path]][3]) for path in files if names[path] in known)
    return {path: seen.problem for path, seen in found.items() if seen.problem is not None}


def _check(
    root: Path, files: Sequence[Path], value_range: ValueRange
) -> Iterator[tuple[Path, Seen]]:
    look = partial(_look, value_range=value_range)
    start = last = time.monotonic()
    every = _FIRST_LINE_S
    with ThreadPoolExecutor(min(_MOST_THREADS, (os.cpu_count() or 1) + 4)) as pool:
        for first in range(0, len(files), _AT_ONCE):
            some = files[first : first + _AT_ONCE]
            yield from zip(some, pool.map(look, some), strict=True)
            now, done = time.monotonic(), first + len(some)
            if now - last > every and done < len(files):
                left = (now - start) / done * (len(files) - done) / 60
                line = f"{done:,} of {len(files):,} images read, {left:.1f} min left"
                _LOG.warning("checking %s: %s", root, line)
                last, every = now, _LINE_EVERY_S


def _look(path: Path, value_range: ValueRange) -> Seen:
    try:
        check_image(path, value_range)
    except ImageError as error:
        return Seen(str(error).rstrip("."), 1)
    return Seen(None, count_pictures(path))


def _stamp(path: Path) -> list[int] | None:
    """Size and times, which change with the file; None: there is no such file.

    The second time is new even where a copy keeps the first.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cache_file(root: Path, value_range: ValueRange) -> Path | None:
    """Where what is known of a folder, read with a range, is kept; None: nowhere."""
    what = str(root.resolve()) + (f" {value_range}" if value_range else "")
    key = hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:32]
    try:
        base = Path(os.environ.get("TOKENDIAL_CACHE") or Path.home() / ".cache" / "tokendial")
        folder = base / "checked_images"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _LOG.info("what was checked is not remembered: %s", error)
        return None
    return folder / f"{key}.json"


@contextmanager
def _alone(cache: Path | None) -> Iterator[None]:
    """Wait until no other process checks the same folder, where the system has locks."""
    try:
        import fcntl

        if cache is None:
            raise OSError
        file = cache.with_suffix(".lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network drives have none
            _LOG.info("%s cannot be locked: %s", cache, error)
        yield


def _load(cache: Path | None) -> dict[str, list[int]]:
    """Size, times and number of pictures of whole files, by path below the folder."""
    if cache is None:
        return {}
    try:
        kept: Any = json.loads(cache.read_text(encoding="utf-8"))
        files: dict[str, list[int]] = kept["files"] if kept["version"] == _VERSION else {}
    except (KeyError, OSError, TypeError, ValueError):
        return {}
    return files


def _save(cache: Path | None, files: dict[str, list[int]]) -> None:
    if cache is None:
        return
    try:
        with atomic_write(cache) as path:
            path.write_text(json.dumps({"version": _VERSION, "files": files}), encoding="utf-8")
    except OSError as error:
        _LOG.info("what was checked is not remembered: %s", error)
