"""Finds the ViTs inside of a larger model."""

from torch import nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.kinds import anatomy_of, refusal
from tokendial.backbones.windowed import WindowedEncoder


def find_towers(model: nn.Module) -> dict[str, Anatomy | WindowedEncoder]:
    """The ViTs in a model that can run under a dial, by their names in the model.

    A ViT that is a part of another one that was found, such as the encoder of a classifier, is not
    listed again. The name of `model` itself is "".
    """
    found: dict[str, Anatomy | WindowedEncoder] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered or not (tower := _tower(module)):
            continue
        found[name] = tower
        covered |= {id(part) for part in module.modules()}
    return found


def refused_towers(model: nn.Module) -> dict[str, str]:
    """The other ViTs of known classes in a model, by name: the class, and why it has no dial.

    One that holds a ViT that can run under a dial is not listed.
    """
    refused: dict[str, str] = {}
    covered = {id(p) for tower in find_towers(model).values() for p in tower.vit.modules()}
    for name, module in model.named_modules():
        parts = {id(part) for part in module.modules()}
        if parts & covered or not (reason := refusal(module)):
            continue
        refused[name] = f"{type(module).__name__}: {reason}"
        covered |= parts
    return refused


def _tower(module: nn.Module) -> Anatomy | WindowedEncoder | None:
    if encoder := WindowedEncoder.of(module):
        return encoder
    try:
        return anatomy_of(module)
    except ValueError:  # `refused_towers` tells those of known classes
        return None
