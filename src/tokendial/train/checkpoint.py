"""Checkpoints: everything a killed run needs to go on as if nothing had happened."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.atomic import replacing
from tokendial.train.sharding import spread

_KEPT = 2


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
    """Write `folder/update-00000100.pt` whole or not at all, and keep the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"update-{update:08d}.pt") as path:
        torch.save(state, path)
    for old in _all(folder)[:-_KEPT]:
        old.unlink()


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state that was written last, or None."""
    files = _all(folder)
    if not files:
        return None
    state: dict[str, Any] = torch.load(files[-1], map_location="cpu", weights_only=True)
    return state


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-*.pt"))
