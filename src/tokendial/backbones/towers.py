"""Finds the ViTs inside of a larger model."""

from torch import nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.kinds import anatomy_of


def find_towers(model: nn.Module) -> dict[str, Anatomy]:
    """The ViTs in a model whose blocks can be run one by one, by their names in the model.

    A ViT that is a part of another one that was found, such as the encoder of a classifier, is not
    listed again. The name of `model` itself is "".
    """
    found: dict[str, Anatomy] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered:
            continue
        try:
            anatomy = anatomy_of(module)
        except ValueError:
            continue
        found[name] = anatomy
        covered |= {id(part) for part in module.modules()}
    return found
