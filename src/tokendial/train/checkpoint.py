"""Checkpoints, from which a run continues with bit-identical results; and the weight average."""

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
from tokendial.train.sharding import shard_like

_KEPT_CHECKPOINTS = 2
_STATE_KEYS = {"position", "weights", "buffers", "optimizer", "ema", "scaler"}
_LOG = logging.getLogger(__name__)


class Ema:
    """Exponential moving average of the trainable parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights, by 1 - decay."""
        present = trainable(model)
        torch._foreach_lerp_(
            list(self.average.values()), [present[n] for n in self.average], 1.0 - self.decay
        )

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the model while the block runs."""
        present = {name: p.detach().clone() for name, p in trainable(model).items()}
        load_trainable(model, self.average)
        try:
            yield
        finally:
            load_trainable(model, present)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state dict, by name, such as statistics of BatchNorm."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers that `saved_buffers` gives."""
    for name, buffer in saved_buffers(model).items():
        buffer.copy_(values[name])


@torch.no_grad()
def load_trainable(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the trainable parameters."""
    for name, parameter in trainable(model).items():
        parameter.copy_(shard_like(values[name], parameter))


def save_checkpoint(folder: Path, update: int, state: dict[str, Any]) -> None:
    """Write `folder/update-00000100.pt` whole or not at all, and delete all but the newest two.

    Checkpoints of later updates are deleted, too: they are damaged, and the run resumed from an
    earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"update-{update:08d}.pt"
    # torch gets an open file: its own writer would hide the system's error on a full disk.
    with atomic_write(written) as path, path.open("wb") as file:
        torch.save(state, file)
    up_to_now = [path for path in _checkpoints(folder) if path <= written]
    for other in set(_checkpoints(folder)) - set(up_to_now[-_KEPT_CHECKPOINTS:]):
        other.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints.

    Damaged ones are logged as warnings.

    Raises:
        ValueError: If all checkpoints are damaged.
    """
    files = _checkpoints(folder)
    for path in reversed(files):
        damage = _damage(path)
        if damage is None:
            return path
        _LOG.warning("%s is damaged (%s): left out", path, damage)
    if files:
        raise ValueError(
            f"output: none of the {len(files)} checkpoints in {folder} can be read; remove them "
            "to train from the beginning."
        )
    return None


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint. With `mmap`, a tensor is read from the disk only when it is used."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    return state


def _damage(path: Path) -> str | None:
    """The defect of a checkpoint; None if it is intact.

    torch writes a checksum of each tensor but does not verify it when it reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                return f"wrong checksum of {part}"
        state = read_checkpoint(path, mmap=True)
    except Exception as error:  # zipfile and torch raise errors of any type on damaged files
        return error_message(error)
    missing = _STATE_KEYS - state.keys() if isinstance(state, dict) else _STATE_KEYS
    return f"no {min(missing)} in it" if missing else None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("update-*.pt"))
