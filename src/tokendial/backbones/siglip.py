"""SigLIP's and SigLIP 2's image towers of the transformers library, which pool by attention."""

# Shape legend: B batch, H heads, N tokens, L patch tokens, D embed_dim.

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.naflexvit import batch_patchify
from torch import Tensor

from tokendial.backbones.anatomy import BlockInputs, split_heads
from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.tokens import Tokens


class HuggingFaceSiglip(HuggingFaceViT):
    """SigLIP's image tower.

    `classify` returns the output of its attention pooling head, in which a merged token counts as
    often as the patches that it stands for. Without that head it returns the mean of the patches,
    which is also what the classification model reads.
    """

    def classify(self, tokens: Tokens) -> Tensor:
        if hasattr(self.vit, "classifier") or not self.trunk.use_head:
            return super().classify(tokens)
        return pool_by_attention(self.trunk.head, self.norm(tokens.x), tokens.size)


class HuggingFaceSiglip2(HuggingFaceSiglip):
    """SigLIP 2's image tower (NaFlex) on images of one size.

    It cuts the images into patches as the image processor does. All patches are valid, so nothing
    is masked. Batches of patches with masks are not supported.
    """

    def read_call(
        self, attention_mask: Tensor | None = None, *arguments: Any, **named: Any
    ) -> BlockInputs:
        super().read_call(*arguments, **named)
        return BlockInputs.of_padding_mask(attention_mask)

    @property
    def image_size(self) -> tuple[int, int]:
        (rows, columns), side = self.patch, self._side
        return side * rows, side * columns

    def run_vit(self, images_B3HW: Tensor) -> Any:
        patches, _ = batch_patchify(images_B3HW, self.patch, pad=False)
        shapes = torch.tensor([self.grid(images_B3HW)] * len(images_B3HW), device="cpu")
        # None: all patches are valid. A mask would be read, and costs are counted without values.
        return self.vit(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes)

    @property
    def _side(self) -> int:
        """Rows, and columns, of patches that the positions were trained for."""
        return math.isqrt(self.config.num_patches)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        grid = self.grid(images_B3HW)
        embeddings = self.trunk.embeddings
        patches, _ = batch_patchify(images_B3HW, self.patch, pad=False)
        x = embeddings.patch_embedding(patches.to(embeddings.patch_embedding.weight.dtype))
        return Tokens(x + self._positions(grid), self.num_prefix_tokens, grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The positions [L, D] of a grid, resized as the model itself does for each image."""
        positions, side = self.trunk.embeddings.position_embedding.weight, self._side
        if grid == (side, side):
            return positions  # type: ignore[no-any-return]
        square = positions.float().T.reshape(1, -1, side, side)
        resized = F.interpolate(square, size=grid, mode="bilinear", antialias=True)
        return resized[0].flatten(1).T.to(positions.dtype)


def pool_by_attention(head: Any, x_BND: Tensor, size_BN: Tensor | None) -> Tensor:
    """Run SigLIP's attention pooling head, with the log of token sizes on the attention logits.

    Args:
        head: transformers' module, whose probe attends to the tokens.
        x_BND: Tokens after the final norm.
        size_BN: Patches per token; None: one each.

    Returns:
        [B, D].
    """
    # PyTorch's attention layer only reads the weights of its out_proj, so a LoRA there would have
    # no effect. Here its parts are called one by one.
    attn, width = head.attention, x_BND.shape[-1]
    weights, biases = (
        p.split([width, 2 * width]) for p in (attn.in_proj_weight, attn.in_proj_bias)
    )
    query = F.linear(head.probe.expand(x_BND.shape[0], -1, -1), weights[0], biases[0])
    keys, values = F.linear(x_BND, weights[1], biases[1]).chunk(2, dim=-1)
    q, k, v = (split_heads(part, attn.num_heads) for part in (query, keys, values))
    bias = None if size_BN is None else size_BN.log().to(q.dtype)[:, None, None, :]
    pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    pooled = attn.out_proj(pooled)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]  # type: ignore[no-any-return]
