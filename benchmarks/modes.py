"""How models run: as PyTorch runs them, or compiled with frozen weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner

MODES = ("eager", "optimised")


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """A model compiled for one shape, its weights constants: the best that PyTorch does by itself.

    Compiled at its first call, which has to be within `torch.no_grad()`, or nothing is frozen.
    """
    # Each degree and each shape is a graph of its own.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})


def plain(model: nn.Module, images: Tensor, mode: str) -> Runner:
    """A model without a dial."""
    run = model if mode == "eager" else compiled(model)
    return Runner(lambda: run(images))


def at_degrees(
    model: td.DialViT, images: Tensor, mode: str, degrees: Sequence[int]
) -> Iterator[Runner]:
    """A model at some degrees of its dial."""
    run = model if mode == "eager" else compiled(model)
    for degree in degrees:
        yield Runner(lambda: run(images), lambda to=degree: model.set_degree(to))
