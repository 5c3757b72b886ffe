"""The attention kernel of training: matrix products where PyTorch's fused backward pass is slow."""

from dataclasses import replace

import torch
from torch import nn

from tokendial.model.dial_vit import DialViT
from tokendial.tune import Precision

_MAX_TOKENS = 512
"""Unfused attention keeps every attention map for the backward pass. Above this number of tokens,
the maps take more memory than the rest of a training step."""


def choose_attention(objective: nn.Module, device: torch.device, precision: Precision) -> None:
    """Choose how the models of an objective compute attention while they are trained.

    On CPUs, PyTorch computes the backward pass of fused attention in bfloat16 slowly: it is half of
    a training step of ViT-S with 65 tokens. Matrix products make the step 1.1 to 1.8 times as fast
    (docs/speed.md). Results are the same up to rounding.

    Args:
        objective: The module that is trained. Each `DialViT` in it is changed in place.
        device: Device that it is trained on.
        precision: Precision of the forward pass.
    """
    if device.type != "cpu" or precision != "bf16":
        return
    for part in objective.modules():
        if isinstance(part, DialViT):
            shape = part.anatomy.shape
            if shape.num_patches + shape.num_prefix_tokens <= _MAX_TOKENS:
                part.attention_kernel = replace(part.attention_kernel, fused=False)
