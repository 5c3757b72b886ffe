"""How models run: as PyTorch runs them, or treated for speed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner

MODES = ("eager", "optimised", "compiled")


def plain(model: nn.Module, images: Tensor, mode: str) -> Runner:
    """A model without a dial; compiled with its weights as constants, unless the mode is eager.

    Compiled at its first call, which has to be within `torch.no_grad()`, or nothing is frozen.
    """
    if mode == "eager":
        return Runner(lambda: model(images))
    run = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})
    return Runner(lambda: run(images))


def at_degrees(
    model: td.DialViT, images: Tensor, mode: str, degrees: Sequence[int]
) -> Iterator[Runner]:
    """A model at some degrees of its dial; by `td.optimize`, unless the mode is eager."""
    run: td.DialViT | td.OptimizedViT = model
    in_threads = False
    if mode != "eager":
        model.set_degree(degrees[0])  # treatments are tried there
        run = td.optimize(model, images, degrees=degrees, compile=mode == "compiled")
        in_threads = any(trial.name == "a core each" and trial.kept for trial in run.trials)
    for degree in degrees:
        yield Runner(lambda: run(images), lambda to=degree: run.set_degree(to), seen=not in_threads)
