"""Segmenter's decoder: transformer blocks on the patch tokens and on one embedding per class.

Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
https://arxiv.org/abs/2105.05633, section 3.2, and the authors' code.
"""

# Shape legend: B batch, L patch tokens, D width of the decoder, H x W patch grid, K classes.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokendial.checks import check_count, check_dropout
from tokendial.decode.base import DecoderConfig
from tokendial.methods import register
from tokendial.reduce.base import init_linears
from tokendial.shape import ViTShape


@register("decode", "mask_transformer")
@dataclass(frozen=True, kw_only=True)
class MaskTransformer(DecoderConfig):
    """Segmenter's decoder: logits are dot products of patch tokens and class embeddings."""

    num_classes: int = 1
    """Number of classes. Each has a learned embedding and gives one logit map."""
    dim: int | None = None
    """Width of the decoder's tokens. None: the width of the backbone."""
    depth: int = 2
    """Number of transformer blocks of the decoder."""
    num_heads: int | None = None
    """Number of attention heads; must divide `dim`. None: one head for each 64 channels."""
    dropout: float = 0.1
    """Probability of dropout after attention and in the FFNs in training, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "depth"):
            check_count(name, getattr(self, name))
        for name in ("dim", "num_heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_dropout("dropout", self.dropout)

    def build(self, vit: ViTShape) -> "MaskTransformerDecoder":
        """Make the decoder. Raises a ValueError unless the number of heads divides its width."""
        dim = self.dim or vit.embed_dim
        heads = self.num_heads or max(1, dim // 64)
        if dim % heads:
            raise ValueError(f"num_heads must divide the decoder's width {dim}, got {heads}.")
        return MaskTransformerDecoder(self, vit.embed_dim, dim, heads)


class MaskTransformerDecoder(nn.Module):
    """Runs Segmenter's decoder."""

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
        """Return the logits [B, K, H, W] of a feature map."""
        grid = x_BDHW.shape[-2:]
        x = self.project(x_BDHW.flatten(2).transpose(1, 2))
        num_classes = self.classes.shape[1]
        x = self.norm(self.blocks(torch.cat([x, self.classes.expand(x.shape[0], -1, -1)], dim=1)))
        patches_BLD = F.normalize(self.project_patches(x[:, :-num_classes]), dim=-1)
        classes_BKD = F.normalize(self.project_classes(x[:, -num_classes:]), dim=-1)
        masks_BLK = self.mask_norm(patches_BLD @ classes_BKD.transpose(1, 2))
        return masks_BLK.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]
