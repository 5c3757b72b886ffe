"""Checkpoints: everything a killed run needs to go on as if nothing had happened."""

import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.atomic import atomic_write
from tokendial.errors import error_message
from tokendial.train.sharding import spread

_KEPT = 2
_STATE = {"position", "weights", "buffers", "optimizer", "ema", "scaler"}
_LOG = logging.getLogger(__name__)


class Ema:
    """Moving average of the weights that train."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights."""
        present = trained(model)
        torch._foreach_lerp_(
            list(self.average.values()), [present[n] for n in self.average], 1.0 - self.decay
        )

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averaged weights in the model."""
        present = {name: p.detach().clone() for name, p in trained(model).items()}
        load_trained(model, self.average)
        try:
            yield
        finally:
            load_trained(model, present)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Names and parameters that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Names and values of the buffers that are saved: what a BatchNorm has gathered."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers that are saved."""
    for name, buffer in kept_buffers(model).items():
        buffer.copy_(values[name])


@torch.no_grad()
def load_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters that train."""
    for name, parameter in trained(model).items():
        parameter.copy_(spread(values[name], parameter))


def save_checkpoint(folder: Path, update: int, state: dict[str, Any]) -> None:
    """Write `folder/update-00000100.pt` whole or not at all, and keep the newest two.

    Those of later updates go, too: the run went back behind them, because they cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"update-{update:08d}.pt"
    # Into an open file: torch's own would not tell what the system said when the disk is full.
    with atomic_write(written) as path, path.open("wb") as file:
        torch.save(state, file)
    up_to_now = [path for path in _all(folder) if path <= written]
    for other in set(_all(folder)) - set(up_to_now[-_KEPT:]):
        other.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that was written last of those that are whole, or None if there is none.

    What is wrong with later ones is logged as warnings.

    Raises:
        ValueError: If there are checkpoints, but none of them is whole.
    """
    files = _all(folder)
    for path in reversed(files):
        wrong = _damage(path)
        if wrong is None:
            return path
        _LOG.warning("%s is damaged (%s): left out", path, wrong)
    if files:
        raise ValueError(
            f"output: none of the {len(files)} checkpoints in {folder} can be read; remove them "
            "to train from the beginning."
        )
    return None


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The state in a checkpoint that is whole; with `mmap`, tensors are read when they are used."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    return state


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint.

    torch writes a checksum of each tensor, and does not look at it when it reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                return f"wrong checksum of {part}"
        state = read_checkpoint(path, mmap=True)
    except Exception as error:  # zipfile and torch raise what they please on garbage
        return error_message(error)
    missing = _STATE - state.keys() if isinstance(state, dict) else _STATE
    return f"no {min(missing)} in it" if missing else None


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-*.pt"))
