"""DINOv3 of the transformers library, whose queries and keys have rotary positions."""

# Shape legend: B batch, H heads, N tokens, L patch tokens, C head_dim, D embed_dim.

from typing import Any

import torch
from torch import Tensor

from tokendial.backbones.anatomy import BlockInputs
from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.backbones.rotary import rotate_patches
from tokendial.tokens import Tokens


class HuggingFaceDINOv3(HuggingFaceViT):
    """transformers' DINOv3. A token that absorbs others keeps its own rotary position."""

    def embed(self, images_B3HW: Tensor) -> Tokens:
        images = images_B3HW.to(self.trunk.embeddings.patch_embeddings.weight.dtype)
        cosines, sines = self.trunk.rope_embeddings(images)
        tokens = super().embed(images)
        tokens.rope = rotary_table(cosines, sines)
        return tokens

    def read_call(
        self,
        *arguments: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **named: Any,
    ) -> BlockInputs:
        super().read_call(*arguments, **named)
        if position_embeddings is None:
            return BlockInputs()
        return BlockInputs(rotary_table(*position_embeddings))

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(layer, x_BND, tokens)
        if tokens.rope is None:
            raise ValueError("DINOv3's attention needs tokens.rope: see rotary_table().")
        q, k = (rotate_patches(tokens, tokens.rope, part, half=True) for part in (q, k))
        return q.type_as(v), k.type_as(v), v


def rotary_table(cosines_LC: Tensor, sines_LC: Tensor) -> Tensor:
    """The position embeddings that DINOv3 gives its blocks, as `Tokens.rope` [L, 2 * C]."""
    return torch.cat([sines_LC, cosines_LC], dim=-1)
