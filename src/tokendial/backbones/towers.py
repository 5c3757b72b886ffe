"""Finds the ViTs inside of a larger model."""

from torch import nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.kinds import anatomy_of
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


def _tower(module: nn.Module) -> Anatomy | WindowedEncoder | None:
    if encoder := WindowedEncoder.of(module):
        return encoder
    try:
        return anatomy_of(module)
    except ValueError:
        return None
