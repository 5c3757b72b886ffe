"""Atomic writing: a file is either the old one or the complete new one."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""System errors for a file that cannot grow: full disk, quota, size limit, or a broken disk."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block raises no error.

    A reader sees the old file or the complete new one, also after a crash.

    Raises:
        OSError: If the disk is full, also where the writing library raised another error for it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        if (number := _refusal(error)) is None:
            raise
        message = f"{os.strerror(number)}, the file stays as it was"
        raise OSError(number, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def leftover_files(path: Path) -> list[Path]:
    """List the temporary files of processes that died while they wrote `path`.

    Files of processes that still write are listed too, so the caller has to make sure that there
    are none. The name of `path` may be a glob pattern.
    """
    return list(path.parent.glob(f".{path.name}.{'[a-z0-9_]' * 8}"))


def _refusal(error: BaseException | None) -> int | None:
    """Find the errno among `_REFUSALS` that caused an error; None if there is none."""
    while error is not None:
        # safetensors gives the number in the message only.
        words = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(words[1]) if words else None
        if number in _REFUSALS:
            return number
        error = error.__cause__ or error.__context__
    return None


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
