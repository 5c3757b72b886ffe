"""Fine-tuning without adapters: the head alone, or everything."""

from dataclasses import dataclass

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.methods import register
from tokendial.reduce.base import ViTShape


@register("adapt", "linear")
@dataclass(frozen=True, kw_only=True)
class Linear(AdapterConfig):
    """Linear probe: train the classification head, freeze the rest."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module."""
        return Adapter()


@register("adapt", "full")
@dataclass(frozen=True, kw_only=True)
class Full(AdapterConfig):
    """Full fine-tuning: train every weight of the backbone and the head."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module."""
        return _Unfrozen()


class _Unfrozen(Adapter):
    def install(self, vit: nn.Module) -> None:
        vit.requires_grad_(True)
