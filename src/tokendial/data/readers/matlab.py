"""Read MATLAB files, in which several data sets are published."""

import zlib
from pathlib import Path

import numpy as np

from tokendial.data.readers.lists import require_file


def read_mat(path: Path, source: str, *names: str) -> list[np.ndarray]:
    """Return variables of a MATLAB file as arrays of at least one dimension.

    Dimensions of size 1 are removed.

    Args:
        path: The `.mat` file.
        source: Sentence that says where to get the file, for the error if it is missing.
        names: Names of the variables to read.

    Raises:
        ValueError: If the file is missing, cannot be read or lacks a variable, or if scipy is not
            installed.
    """
    require_file(path, source)
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise ValueError(
            f"data: reading {path} needs scipy: pip install 'tokendial[matlab]'."
        ) from None
    try:
        variables = loadmat(path, squeeze_me=True, variable_names=names)
    except (MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data: {path} is not a readable MATLAB file ({reason}).") from None
    if missing := [name for name in names if name not in variables]:
        raise ValueError(f"data: {path} has no variable {missing[0]!r}.")
    return [np.atleast_1d(variables[name]) for name in names]
