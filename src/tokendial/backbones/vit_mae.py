"""The encoder of MAE in the transformers library, without random masking."""

# Shape legend: B batch, D embed_dim.

import torch
from torch import Tensor

from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.tokens import Tokens


class HuggingFaceMAE(HuggingFaceViT):
    """transformers' ViTMAEModel on all patches of an image, in their order.

    The model itself drops a random share of the patches (`mask_ratio`) and shuffles the others, as
    pre-training does. Here nothing is masked, as in fine-tuning; the outputs are those of the model
    with a mask ratio of 0. `classify` returns the class token.
    """

    def embed(self, images_B3HW: Tensor) -> Tokens:
        grid = self.grid(images_B3HW)
        embeddings = self.trunk.embeddings
        patches = embeddings.patch_embeddings(images_B3HW)
        positions = embeddings.position_embeddings
        if self.resize_options(images_B3HW):
            height, width = images_B3HW.shape[-2:]
            positions = embeddings.interpolate_pos_encoding(patches, height, width)
        first = (embeddings.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        x = torch.cat([first, patches + positions[:, 1:]], dim=1)
        return Tokens(x, self.num_prefix_tokens, grid)
