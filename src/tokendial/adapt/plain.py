"""Fine-tuning without adapters: the head, the biases, the last blocks, or everything."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("adapt", "linear")
@dataclass(frozen=True, kw_only=True)
class LinearProbe(AdapterConfig):
    """Linear probe: train the classification head, freeze the rest."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module."""
        return Adapter()


@register("adapt", "full")
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdapterConfig):
    """Full fine-tuning: train every weight of the backbone and the head."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module."""
        return _Unfrozen()


class _Unfrozen(Adapter):
    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vit.requires_grad_(True)


@register("adapt", "bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterConfig):
    """Train every bias of the backbone, those of norms and of the patch embedding included.

    Source: Ben Zaken et al., "BitFit", ACL 2022, https://arxiv.org/abs/2106.10199.
    """

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module."""
        return _Biases()


@register("adapt", "last_blocks")
@dataclass(frozen=True, kw_only=True)
class LastBlocks(AdapterConfig):
    """Train the last `blocks` blocks, freeze what comes before them."""

    blocks: int = 1
    """How many blocks train."""

    def __post_init__(self) -> None:
        if type(self.blocks) is not int or self.blocks < 1:
            raise ValueError(f"blocks must be an integer of at least 1, got {self.blocks}.")

    def build(self, vit: ViTShape) -> Adapter:
        """Make the (empty) module; raises a ValueError if there are not so many blocks."""
        if self.blocks > vit.depth:
            raise ValueError(f"blocks must lie in [1, {vit.depth}], got {self.blocks}.")
        return _Last(self.blocks)


class _Biases(Adapter):
    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for name, parameter in vit.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


class _Last(Adapter):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.number = blocks

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for block in blocks[-self.number :]:
            block.requires_grad_(True)
