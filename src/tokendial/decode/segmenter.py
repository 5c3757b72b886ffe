"""Segmenter's decoder: class embeddings and patches meet in a few transformer blocks.

Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
https://arxiv.org/abs/2105.05633, section 3.2, and the authors' code.
"""

# Shape legend: B batch, L patch tokens, D width of the decoder, K classes.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokendial.decode.base import DecoderConfig, check_counts, check_dropout
from tokendial.methods import register
from tokendial.reduce.base import init_linears
from tokendial.shape import ViTShape


@register("decode", "mask_transformer")
@dataclass(frozen=True, kw_only=True)
class MaskTransformer(DecoderConfig):
    """Masks are products of class embeddings and patches; at the resolution of the patches."""

    num_classes: int = 1
    """Classes, each with a learned embedding and a logit map."""
    dim: int | None = None
    """Width of the decoder; None: the encoder's."""
    depth: int = 2
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads; None: one for each 64 channels."""
    dropout: float = 0.1
    """Dropout after attention and in the FFNs, in training."""

    def __post_init__(self) -> None:
        check_counts(num_classes=self.num_classes, depth=self.depth)
        check_dropout(self.dropout)

    def build(self, vit: ViTShape) -> "MaskTransformerDecoder":
        """Make the module."""
        dim = self.dim or vit.embed_dim
        heads = self.num_heads or max(1, dim // 64)
        if dim % heads:
            raise ValueError(f"num_heads must divide the decoder's width {dim}, got {heads}.")
        return MaskTransformerDecoder(self, vit.embed_dim, dim, heads)


class MaskTransformerDecoder(nn.Module):
    """Runs the Mask Transformer."""

    def __init__(self, config: MaskTransformer, encoder_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_dim, dim)
        self.classes = nn.Parameter(torch.zeros(1, config.num_classes, dim))
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, qkv_bias=True, proj_drop=config.dropout, norm_layer=nn.LayerNorm)
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.project_patches = nn.Linear(dim, dim, bias=False)
        self.project_classes = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_classes)
        init_linears(self)
        nn.init.trunc_normal_(self.classes, std=0.02)
        for linear in (self.project_patches, self.project_classes):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Logits [B, K, H, W] of a feature map: one mask per class."""
        grid = x_BDHW.shape[-2:]
        x = self.project(x_BDHW.flatten(2).transpose(1, 2))
        number = self.classes.shape[1]
        x = self.norm(self.blocks(torch.cat([x, self.classes.expand(x.shape[0], -1, -1)], dim=1)))
        patches_BLD = F.normalize(self.project_patches(x[:, :-number]), dim=-1)
        classes_BKD = F.normalize(self.project_classes(x[:, -number:]), dim=-1)
        masks_BLK = self.mask_norm(patches_BLD @ classes_BKD.transpose(1, 2))
        return masks_BLK.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]
