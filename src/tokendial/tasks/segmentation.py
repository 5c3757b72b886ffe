"""Semantic segmentation: a decoder on the feature map of a wrapped model.

Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
https://arxiv.org/abs/2105.05633, section 3.2, and the authors' code.
"""

# Shape legend: B batch, L patch tokens, D width of the decoder, K classes.

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokendial.vit import DialViT


class MaskTransformer(nn.Module):
    """Class embeddings join the patch tokens; masks are their products after a few blocks."""

    def __init__(
        self,
        encoder_dim: int,
        num_classes: int,
        *,
        dim: int | None = None,
        depth: int = 2,
        num_heads: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        """Make the decoder.

        Args:
            encoder_dim: Width of the encoder's tokens.
            num_classes: Classes, each with a learned embedding.
            dim: Width of the decoder; None: the encoder's.
            depth: Number of blocks.
            num_heads: Attention heads; None: one for each 64 channels.
            dropout: Dropout after attention and in the FFNs.
        """
        super().__init__()
        dim = encoder_dim if dim is None else dim
        self.project = nn.Linear(encoder_dim, dim)
        self.classes = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    num_heads or dim // 64,
                    qkv_bias=True,
                    proj_drop=dropout,
                    norm_layer=nn.LayerNorm,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.project_patches = nn.Linear(dim, dim, bias=False)
        self.project_classes = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.classes, std=0.02)
        for linear in (self.project_patches, self.project_classes):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Logits [B, K, H, W] of a feature map: one mask per class."""
        grid = x_BDHW.shape[-2:]
        x = self.project(x_BDHW.flatten(2).transpose(1, 2))
        number = self.classes.shape[1]
        x = self.norm(self.blocks(torch.cat([x, self.classes.expand(len(x), -1, -1)], dim=1)))
        patches_BLD = F.normalize(self.project_patches(x[:, :-number]), dim=-1)
        classes_BKD = F.normalize(self.project_classes(x[:, -number:]), dim=-1)
        masks_BLK = self.mask_norm(patches_BLD @ classes_BKD.transpose(1, 2))
        return masks_BLK.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]


class Segmenter(nn.Module):
    """A wrapped model as encoder, and a decoder on its feature map; the dial is the encoder's."""

    def __init__(self, model: DialViT, decoder: nn.Module) -> None:
        super().__init__()
        self.model, self.decoder = model, decoder

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits [B, K, H, W], at the size of the images."""
        masks = self.decoder(self.model.feature_map(images_B3HW))
        return F.interpolate(masks, images_B3HW.shape[-2:], mode="bilinear")
