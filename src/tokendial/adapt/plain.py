"""Fine-tuning without new weights: train the head, the biases, the last blocks, or all weights.

Sources: these are standard baselines; see `BitFit` for its paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("adapt", "linear")
@dataclass(frozen=True, kw_only=True)
class LinearProbe(AdapterConfig):
    """Linear probe: train the classification head only."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make a module without weights."""
        return Adapter()


@register("adapt", "full")
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdapterConfig):
    """Full fine-tuning: train all weights of the backbone and the head."""

    def build(self, vit: ViTShape) -> Adapter:
        """Make a module without weights."""
        return _FullFineTuningAdapter()


class _FullFineTuningAdapter(Adapter):
    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vit.requires_grad_(True)


@register("adapt", "bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterConfig):
    """BitFit: train all biases of the backbone, also those of norms and of the patch embedding.

    Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models", ACL 2022, https://arxiv.org/abs/2106.10199.
    """

    def build(self, vit: ViTShape) -> Adapter:
        """Make a module without weights."""
        return _BitFitAdapter()


@register("adapt", "last_blocks")
@dataclass(frozen=True, kw_only=True)
class LastBlocks(AdapterConfig):
    """Train the last blocks of the backbone and the head; freeze all blocks before them."""

    blocks: int = 1
    """Number of blocks that train, counted from the end."""

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)

    def build(self, vit: ViTShape) -> Adapter:
        """Make a module without weights. Raises a ValueError if the backbone has fewer blocks."""
        if self.blocks > vit.depth:
            raise ValueError(f"blocks must lie in [1, {vit.depth}], got {self.blocks}.")
        return _LastBlocksAdapter(self.blocks)


class _BitFitAdapter(Adapter):
    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for name, parameter in vit.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


class _LastBlocksAdapter(Adapter):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.num_blocks = blocks

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for block in blocks[-self.num_blocks :]:
            block.requires_grad_(True)
