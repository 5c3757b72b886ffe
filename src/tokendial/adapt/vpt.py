"""VPT: learned prompt tokens beside the patches.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, https://arxiv.org/abs/2203.12119, section
3.2: prompts stand between the class token and the patches. They count as prefix tokens, so that no
reduction merges or drops them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "vpt")
@dataclass(frozen=True, kw_only=True)
class VPT(AdapterConfig):
    """Visual Prompt Tuning: add learned tokens to the input of each block, or of the first one."""

    prompts: int = 8
    """Number of prompt tokens in each block that gets prompts."""
    deep: bool = True
    """Whether each block gets prompts of its own, which replace those of the block before
    (VPT-Deep). If not, only the first block gets prompts, and they pass through all blocks
    (VPT-Shallow)."""

    def __post_init__(self) -> None:
        check_count("prompts", self.prompts)

    def build(self, vit: ViTShape) -> "Prompts":
        """Make the prompts."""
        return Prompts(self, vit)


class Prompts(Adapter):
    """Runs VPT, with D parameters per prompt.

    Unlike other new adapters, new prompts change the outputs of the model: attention reads them.
    """

    adds_prompts = True

    def __init__(self, config: VPT, vit: ViTShape) -> None:
        super().__init__()
        self.config, self.depth = config, vit.depth
        layers = vit.depth if config.deep else 1
        self.prompts = nn.Parameter(torch.empty(layers, config.prompts, vit.embed_dim))

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Draw the prompts as the authors do: by Xavier's uniform rule for the patch embedding."""
        # In NaFlex models a linear layer embeds the patches: the first one of the model.
        weights = [
            m.weight for m in vit.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)
        ]
        projection = next((weight for weight in weights if weight.ndim > 2), weights[0])
        bound = (6.0 / (projection[0].numel() + self.prompts.shape[-1])) ** 0.5
        nn.init.uniform_(self.prompts, -bound, bound)

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Add the prompts of this block."""
        if layer > len(self.prompts):
            return tokens
        return tokens.with_prompts(self.prompts[layer - 1])

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Remove the prompts after each block (deep), or after the last block."""
        if self.config.deep or layer == self.depth:
            return tokens.without_prompts(self.config.prompts)
        return tokens
