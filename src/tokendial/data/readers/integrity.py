"""Decode every image of a data set before a run, and remember which files are intact."""

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
from tokendial.data.readers.images import (
    ImageError,
    check_image,
    count_pictures,
    warn_of_multi_picture_files,
)
from tokendial.data.readers.pixels import ValueRange

_FILES_PER_ROUND = 1024
"""Number of files given to the threads together; an interruption (Ctrl-C) waits for one round."""
_MAX_THREADS = 16
"""Upper limit of threads; each one holds a whole decoded image, which can take a gigabyte."""
_FIRST_PROGRESS_S, _PROGRESS_EVERY_S = 5.0, 30.0
_CACHE_VERSION = f"1 Pillow {PIL.__version__}"
"""Version of the cache. Another version of Pillow may refuse what this one reads."""
_LOG = logging.getLogger(__name__)


class DecodedFile(NamedTuple):
    """Result of decoding one image file."""

    problem: str | None
    """One line that names the file and says why it cannot be read; None if it can be read."""
    num_pictures: int
    """Number of pictures in the file (pages of a TIFF, frames of an animation)."""


def find_broken_images(
    root: Path, files: Sequence[Path], value_range: ValueRange = None
) -> dict[Path, str]:
    """Return, for each file that cannot be read as an image, one line that says why.

    Every file is decoded, in threads. Intact files are remembered by size and modification times in
    `~/.cache/tokendial` (or the folder in TOKENDIAL_CACHE), so the next run decodes only new and
    changed files. If several processes check the same folder, one decodes and the others wait.
    One logged line names the files that hold several pictures. A long check logs its progress every
    30 seconds.

    Args:
        root: Folder in which the files are.
        files: Image files below `root`.
        value_range: Values that become black and white in images of more than 8 bits; see
            `readers.pixels.ValueRange`.
    """
    cache = _cache_file(root, value_range)
    with _lock(cache):
        # Entries of the cache: path below `root` -> [size, mtime, ctime, number of pictures].
        intact = _load_cache(cache)
        stamps = {path: stamp for path in files if (stamp := _stamp(path))}
        names = {path: str(path.relative_to(root)) for path in files}
        unknown = [path for path in files if intact.get(names[path], [])[:3] != stamps.get(path)]
        decoded: dict[Path, DecodedFile] = {}
        try:
            for path, result in _decode_all(root, unknown, value_range):
                decoded[path] = result
        finally:
            # Also after an interruption, so that the next run continues from here.
            new = {
                names[path]: [*stamps[path], result.num_pictures]
                for path, result in decoded.items()
                if result.problem is None and path in stamps
            }
            if new:
                intact |= new
                _save_cache(cache, intact)
    warn_of_multi_picture_files(
        (path, intact[names[path]][3]) for path in files if names[path] in intact
    )
    return {path: result.problem for path, result in decoded.items() if result.problem is not None}


def _decode_all(
    root: Path, files: Sequence[Path], value_range: ValueRange
) -> Iterator[tuple[Path, DecodedFile]]:
    decode = partial(_decode, value_range=value_range)
    start = last_line = time.monotonic()
    interval = _FIRST_PROGRESS_S
    with ThreadPoolExecutor(min(_MAX_THREADS, (os.cpu_count() or 1) + 4)) as pool:
        for first in range(0, len(files), _FILES_PER_ROUND):
            batch = files[first : first + _FILES_PER_ROUND]
            yield from zip(batch, pool.map(decode, batch), strict=True)
            now, done = time.monotonic(), first + len(batch)
            if now - last_line > interval and done < len(files):
                minutes = (now - start) / done * (len(files) - done) / 60
                progress = f"{done:,} of {len(files):,} images read, {minutes:.1f} min left"
                _LOG.warning("checking %s: %s", root, progress)
                last_line, interval = now, _PROGRESS_EVERY_S


def _decode(path: Path, value_range: ValueRange) -> DecodedFile:
    try:
        check_image(path, value_range)
    except ImageError as error:
        return DecodedFile(str(error).rstrip("."), 1)
    return DecodedFile(None, count_pictures(path))


def _stamp(path: Path) -> list[int] | None:
    """Return size, mtime and ctime of a file, which change with its content; None if it is missing.

    The ctime is new even where a copy keeps the mtime.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cache_file(root: Path, value_range: ValueRange) -> Path | None:
    """Return the cache file of a folder read with a value range; None if no cache can be kept."""
    identity = str(root.resolve()) + (f" {value_range}" if value_range else "")
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    try:
        base = Path(os.environ.get("TOKENDIAL_CACHE") or Path.home() / ".cache" / "tokendial")
        folder = base / "checked_images"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        _LOG.info("the list of intact images is not kept: %s", error)
        return None
    return folder / f"{key}.json"


@contextmanager
def _lock(cache: Path | None) -> Iterator[None]:
    """Wait until no other process checks the same folder, where the system has file locks."""
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
        except OSError as error:  # some network drives have no locks
            _LOG.info("%s cannot be locked: %s", cache, error)
        yield


def _load_cache(cache: Path | None) -> dict[str, list[int]]:
    """Return [size, mtime, ctime, number of pictures] of intact files by path below the folder."""
    if cache is None:
        return {}
    try:
        content: Any = json.loads(cache.read_text(encoding="utf-8"))
        is_current = content["version"] == _CACHE_VERSION
        files: dict[str, list[int]] = content["files"] if is_current else {}
    except (KeyError, OSError, TypeError, ValueError):
        return {}
    return files


def _save_cache(cache: Path | None, files: dict[str, list[int]]) -> None:
    if cache is None:
        return
    try:
        with atomic_write(cache) as path:
            content = json.dumps({"version": _CACHE_VERSION, "files": files})
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        _LOG.info("the list of intact images is not kept: %s", error)
