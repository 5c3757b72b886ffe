"""Runners of models in three modes: eager, optimised, and compiled."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner

MODES = ("eager", "optimised", "compiled")


def plain(model: nn.Module, images: Tensor, mode: str) -> Runner:
    """A runner of a model without a dial. Unless the mode is eager, the model is compiled.

    It is compiled in its first call, with its weights as constants. That call must be within
    `torch.no_grad()`, else torch does not freeze the weights.
    """
    if mode == "eager":
        return Runner(lambda: model(images))
    run = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})
    return Runner(lambda: run(images))


def at_degrees(
    model: td.DialViT, images: Tensor, mode: str, degrees: Sequence[int]
) -> Iterator[Runner]:
    """Runners of a model at some degrees. Unless the mode is eager, `td.optimize` prepares it."""
    run: td.DialViT | td.OptimizedViT = model
    in_threads = False
    if mode != "eager":
        model.set_degree(degrees[0])  # treatments are tried there
        run = td.optimize(model, images, degrees=degrees, compile=mode == "compiled")
        in_threads = any(trial.name == "split batch" and trial.kept for trial in run.trials)
    for degree in degrees:
        yield Runner(lambda: run(images), lambda to=degree: run.set_degree(to), seen=not in_threads)
