"""VPT: learned prompt tokens beside the patches.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, https://arxiv.org/abs/2203.12119, section
3.2: prompts stand between the class token and the patches. They count as prefix tokens here, so no
reduction merges or drops them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "vpt")
@dataclass(frozen=True, kw_only=True)
class VPT(AdapterConfig):
    """Add `prompts` tokens to the input of each block (deep) or of the first one (shallow)."""

    prompts: int = 8
    """Number of prompt tokens."""
    deep: bool = True
    """New prompts for each block, in place of those that leave the one before; or only for the
    first, from where they go through the whole model."""

    def __post_init__(self) -> None:
        if type(self.prompts) is not int or self.prompts < 1:
            raise ValueError(f"prompts must be an integer of at least 1, got {self.prompts}.")

    def build(self, vit: ViTShape) -> "Prompts":
        """Make the prompts."""
        return Prompts(self, vit)


class Prompts(Adapter):
    """Runs VPT: D parameters per prompt, and per layer if deep.

    Unlike other adapters, prompts change the outputs from the start: attention sees them.
    """

    def __init__(self, config: VPT, vit: ViTShape) -> None:
        super().__init__()
        self.config, self.depth = config, vit.depth
        layers = vit.depth if config.deep else 1
        self.prompts = nn.Parameter(torch.empty(layers, config.prompts, vit.embed_dim))

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Draw the prompts as the authors do: with Xavier's bound for the projection of a patch."""
        projection = next(m for m in vit.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        bound = (6.0 / (projection.weight[0].numel() + self.prompts.shape[-1])) ** 0.5
        nn.init.uniform_(self.prompts, -bound, bound)

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Add this block's prompts."""
        if layer > len(self.prompts):
            return tokens
        return tokens.with_prompts(self.prompts[layer - 1])

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Take the prompts away before the next block brings its own, or at the end."""
        if self.config.deep or layer == self.depth:
            return tokens.without_prompts(self.config.prompts)
        return tokens
