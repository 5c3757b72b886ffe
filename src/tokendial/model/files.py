"""The files of a saved model or compensator: `config.json` and `model.safetensors`.

A saved model may come from anywhere, so nothing that its files say is used before it is checked.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.errors import error_message
from tokendial.model.hub import local_folder
from tokendial.weights import read_file

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Limits above all that real models have. They keep a configuration from filling the memory before
# it is compared with the tensors.
_MAX_DIGITS = 18
_MAX_BLOCKS = 1000
_MIN_SIZE_LIMIT = 2**16
_BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    TypeError,
)  # fmt: skip


def write_files(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a configuration and tensors; each file is written whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(directory / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps({"format": FORMAT} | config, indent=2) + "\n")


def read_files(
    directory: str | Path, *, kind: str, revision: str | None = None, token: str | None = None
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read what `write_files` wrote: its folder, its configuration and its tensors.

    Args:
        directory: Local folder, or "owner/name" of a repository on the Hugging Face hub.
        kind: What the folder must hold: "model" or "compensator".
        revision: Branch, tag or commit on the hub; None: the main branch.
        token: Access token of the hub; None: the stored one, if any.

    Raises:
        ValueError: If it is not there, or cannot be read.
    """
    folder = local_folder(directory, [CONFIG, WEIGHTS], revision=revision, token=token)
    config = _read_config(folder, kind)
    try:
        return folder, config, read_file(folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from None


def files_revision(paths: Iterable[Path]) -> str:
    """First 12 characters of a hash of files, by which weights are told from others."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


@contextmanager
def config_errors(folder: Path) -> Iterator[None]:
    """Turn errors of building what a configuration describes into a ValueError in one line."""
    try:
        yield
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"{folder / CONFIG} describes nothing that can be built: {error_message(error)}."
        ) from error


def check_field(config: dict[str, Any], name: str, kind: type, folder: Path) -> None:
    """Raise a ValueError if a field of a configuration is missing or of another type."""
    if type(value := config.get(name)) is not kind:
        raise ValueError(
            f"{folder / CONFIG}: {name} must be of type {kind.__name__}, got {value!r:.60}."
        )


def check_numbers(numbers: list[Any], name: str, folder: Path) -> None:
    """Raise a ValueError if a list holds anything but numbers."""
    if odd := [value for value in numbers if type(value) not in (int, float)]:
        raise ValueError(f"{folder / CONFIG}: {name} must hold numbers, got {odd[0]!r:.60}.")


def check_sizes(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a ValueError if a size in a configuration is too large for the file's tensors.

    Called before anything is built.
    """
    most = max(_MIN_SIZE_LIMIT, sum(value.numel() for value in tensors.values()))
    for name in ("backbone", "adapt", "decode"):
        for key, value in _numbers(config.get(name), name):
            limit = _MAX_BLOCKS if key.endswith(("depth", "num_hidden_layers")) else most
            if abs(value) > limit:
                raise ValueError(f"{folder / CONFIG}: {key} must be at most {limit}, got {value}.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """All numbers in plain JSON, each with the dotted path of its place."""
    if isinstance(value, int | float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(
            path.read_text(), parse_constant=_finite, parse_float=_finite, parse_int=_integer
        )
    except OSError:
        raise ValueError(f"{folder} holds no saved {kind}: {CONFIG} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {config!r:.60}.")
    if (found := config.get("kind", "model")) != kind:
        raise ValueError(f"{folder} holds a {found}, not a {kind}.")
    return config


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text:.20}... is too large")
    return int(text)
