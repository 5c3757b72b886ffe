"""Files that are there whole or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says where a file cannot grow: disk, quota or limit exceeded, broken disk."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed onto it if the block ends without an error.

    A reader sees the old file or the new one, never half of one, also after a crash.

    Raises:
        OSError: If the disk is full, whatever error the library that writes made of it.
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
        said = f"{os.strerror(number)}, the file stays as it was"
        raise OSError(number, said, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def leftover_files(path: Path) -> list[Path]:
    """The temporary files of processes that died while they replaced `path`.

    Also those of processes that still do: the caller has to know that there are none. The name may
    be a pattern.
    """
    return list(path.parent.glob(f".{path.name}.{'[a-z0-9_]' * 8}"))


def _refusal(error: BaseException | None) -> int | None:
    """The number of the system's error that made a library raise this one."""
    while error is not None:
        # safetensors tells it in words alone.
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
