"""Reading the MATLAB files that several data sets are published as."""

import zlib
from pathlib import Path

import numpy as np

from tokendial.data.sets.labelled import required_file


def read_mat(path: Path, source: str, *names: str) -> list[np.ndarray]:
    """Variables of a MATLAB file, of one dimension at least.

    Dimensions of size 1 are left out.

    Raises:
        ValueError: If the file is missing (`source` tells where to get it), cannot be read, or
            lacks a variable; or if scipy is not installed.
    """
    required_file(path, source)
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise ValueError(
            f"data: reading {path} needs scipy: pip install 'tokendial[matlab]'."
        ) from None
    try:
        found = loadmat(path, squeeze_me=True, variable_names=names)
    except (MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data: {path} is not a readable MATLAB file ({reason}).") from None
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"data: {path} has no variable {missing[0]!r}.")
    return [np.atleast_1d(found[name]) for name in names]
