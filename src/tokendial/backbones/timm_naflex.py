"""timm's NaFlexVit on images of one size: NaFlex ViTs, and other ViTs built with use_naflex."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from dataclasses import replace
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.helpers import to_2tuple
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor

from tokendial.backbones.anatomy import BlockInputs
from tokendial.backbones.timm_eva import TimmEva
from tokendial.backbones.timm_vit import TimmAnatomy, TimmViT
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class TimmNaFlex(TimmAnatomy):
    """timm's NaFlexVit on images [B, 3, H, W], whose sides are divisible by the patch size.

    Positions are resized to each image size. Batches of patches with masks are not supported.
    """

    model_class = NaFlexVit
    block_classes = (Block, EvaBlock)
    attention_classes = (Attention, AttentionRope, EvaAttention)

    def __init__(self, vit: Any) -> None:
        super().__init__(vit)
        # Its blocks are those of the VisionTransformer or those of Eva.
        self._blocks = TimmEva(vit) if isinstance(vit.blocks[0], EvaBlock) else TimmViT(vit)

    @property
    def shape(self) -> ViTShape:
        vit = self.vit
        rows, columns = vit.embeds.dynamic_feat_size(self.image_size)
        return ViTShape(
            depth=len(vit.blocks),
            embed_dim=vit.embed_dim,
            num_prefix_tokens=vit.num_prefix_tokens,
            num_patches=rows * columns,
            has_class_token=vit.has_class_token,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """The size that the model was created with, or else the one that it was trained at."""
        vit = self.vit
        # Positions are resized to any image, so only the arguments of create_model say a size.
        size = getattr(vit, "_model_args", {}).get("img_size") or vit.embeds.default_img_size
        if size is None:
            size = getattr(vit, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
        height, width = to_2tuple(size)
        return height, width

    @property
    def patch_convolution(self) -> None:
        return None  # its input may be patches, each image with rows and columns of its own

    def grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        if not isinstance(images_B3HW, Tensor) or images_B3HW.ndim != 4:
            raise ValueError(
                "images must be a tensor [batch, 3, height, width]; batches of patches with masks "
                "(NaFlex) are not supported."
            )
        embeds, (height, width) = self.vit.embeds, images_B3HW.shape[-2:]
        patch = embeds.patch_size
        if not embeds.dynamic_img_pad and (height % patch[0] or width % patch[1]):
            raise ValueError(
                f"images must have sides divisible by the patch size {patch[0]}x{patch[1]}, "
                f"got {height}x{width}."
            )
        rows, columns = embeds.dynamic_feat_size((height, width))
        return rows, columns

    def embed(self, images_B3HW: Tensor) -> Tokens:
        grid = self.grid(images_B3HW)
        if images_B3HW.shape[0] == 0:  # len() would fix the batch size of exported files
            return self.embed_none(images_B3HW)
        found: dict[str, Any] = self.vit._forward_embeds(images_B3HW, None, None, None)
        rope = found["rope_embeds"]
        return Tokens(
            found["patches"],
            self.vit.num_prefix_tokens,
            grid,
            rope=torch.stack(rope) if isinstance(rope, list) else rope,
        )

    def with_block(self, block: Any) -> "TimmNaFlex":
        view = super().with_block(block)
        view._blocks = self._blocks.with_block(block)
        return view

    def read_call(
        self, *arguments: Any, attn_mask: Tensor | None = None, **named: Any
    ) -> BlockInputs:
        rope = self._blocks.read_call(*arguments, **named).rope
        return replace(BlockInputs.of_padding_mask(attn_mask), rope=rope)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._blocks.attention_input(layer, x_BND)

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        return self._blocks.qkv(layer, x_BND, tokens)

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        return self._blocks.attention_branch(layer, out_BND, x_BND)

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._blocks.ffn_input(layer, x_BND)

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._blocks.ffn_branch(layer, x_BND)
