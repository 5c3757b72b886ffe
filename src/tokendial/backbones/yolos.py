"""YOLOS of the transformers library, whose detection tokens stand behind the patches."""

# Shape legend: B batch, N tokens, P original positions (prefix + patch), D embed_dim.

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.tokens import Tokens


class HuggingFaceYolos(HuggingFaceViT):
    """transformers' YolosModel. `classify` returns its pooled output, or the class token.

    Its tokens are class token, patches, detection tokens. Here the detection tokens stand with the
    class token before the patches, which changes no output but its order: blocks treat all tokens
    alike. Some models add positions again between blocks. A token that absorbs others then gets
    those of its own patch, as with rotary positions.
    """

    acts_between_blocks = True

    @property
    def num_suffix_tokens(self) -> int:
        return self.num_prefix_tokens - 1

    def embed(self, images_B3HW: Tensor) -> Tokens:
        tokens = super().embed(images_B3HW)
        tokens.x = self.patches_last(tokens.x)
        if self.trunk.encoder.interpolation is not None:
            height, width = images_B3HW.shape[-2:]
            positions = self.trunk.encoder.interpolation((height, width)).squeeze(1)
            tokens.rope = self.patches_last(positions)
        return tokens

    def patches_last(self, x_BND: Tensor) -> Tensor:
        """Put class and detection tokens before the patches, from the model's own order."""
        detection = self.num_prefix_tokens - 1
        first, patches, last = x_BND.tensor_split([1, x_BND.shape[1] - detection], dim=1)
        return torch.cat([first, last, patches], dim=1)

    def enter_block(self, layer: int, tokens: Tokens) -> Tokens:
        if tokens.rope is None or layer == 1:
            return tokens
        prefix, patches = tokens.rope[layer - 2].tensor_split([self.num_prefix_tokens])
        # Prompts of an adapter are further prefix tokens, without a position.
        prefix = F.pad(prefix, (0, 0, 0, tokens.prefix - len(prefix))).expand(
            tokens.x.shape[0], -1, -1
        )
        if tokens.position is None:
            patches = patches.expand(tokens.x.shape[0], -1, -1)
        else:
            patches = patches[tokens.position]
        return replace(tokens, x=tokens.x + torch.cat([prefix, patches], dim=1))
