"""Read weight files without executing code in them, check that numbers are finite, hash tensors."""

import argparse
import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_LFS_POINTER = b"version https://git-lfs"
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_file(path: Path) -> dict[str, Any]:
    """Read a weight file in torch's or safetensors' format.

    The format is recognised by the content, unless the name ends in .safetensors. Only tensors,
    plain values and types that torch considers safe are unpickled.

    Returns:
        Tensors by name. Files in torch's format may hold other values beside or around them.

    Raises:
        ValueError: If the file does not exist, is a Git LFS pointer, is damaged, or needs other
            objects to be unpickled.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    if start.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a pointer of Git LFS instead of the file that it stands for: fetch that "
            "with `git lfs pull`."
        )
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise unreadable_error(path, "safetensors", error) from None
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        # torch warns of pickle protocols that it then fails to read. Training scripts store their
        # arguments as a Namespace, which is harmless.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's message explains at length how to load unsafe files.
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} needs pickled objects ({found[1]}), which are not loaded; save its "
                "tensors alone."
            ) from None
        if "Weights only load failed" in str(error):
            raise ValueError(f"{path} is damaged or not a weight file of torch.") from None
        raise unreadable_error(path, "torch", error) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} is not a weight file: it does not hold tensors by name.")
    return loaded


def unreadable_error(path: Path, whose: str, error: Exception) -> ValueError:
    """Make the error for a file that is not in the format `whose`, or is cut off."""
    reason = (str(error).splitlines() or [""])[0][:80]
    return ValueError(
        f"{path} is damaged or not a weight file of {whose} ({type(error).__name__}: {reason})."
    )


def check_finite(
    tensors: Mapping[str, Any], where: object, own: Mapping[str, Tensor] | None = None
) -> None:
    """Check that all weights are finite floating-point tensors.

    Args:
        tensors: Weights by name.
        where: Source of the weights, such as a path, for the message.
        own: The model's tensors by name, if the model is known. Where they are integers, the file's
            may be, too.

    Raises:
        ValueError: If a value is not a tensor, or holds NaN, infinity or non-floats. The message
            names it.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            found = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: {name} must be a dense tensor, got {found}.")
        wanted = own.get(name) if own else None
        if wanted is not None and not wanted.is_floating_point() and value.dtype == wanted.dtype:
            continue
        if not value.is_floating_point():
            raise ValueError(f"{where}: {name} must be of a float type, got {value.dtype}.")
        if value.is_meta or not value.numel():
            continue
        bounds = (value if value.dtype in _PLAIN else value.float()).aminmax()
        if any(bound.isnan() for bound in bounds):
            raise ValueError(f"{where}: {name} must hold finite numbers, got NaN.")
        if any(bound.isinf() for bound in bounds):
            raise ValueError(f"{where}: {name} must hold finite numbers, got infinity.")
