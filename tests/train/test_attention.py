import pytest
import torch
from examples import tiny_vit
from torch import nn

import tokendial as td
from tokendial.attention import PYTORCH_KERNEL
from tokendial.train.attention import choose_attention


def chosen(device: str = "cpu", precision: str = "bf16", tokens: int = 0) -> bool:
    """Whether the model inside of an objective keeps fused attention."""
    vit = tiny_vit(img_size=8 * 23) if tokens else tiny_vit()
    model = td.wrap(vit)
    assert not tokens or model.anatomy.shape.num_patches > tokens
    choose_attention(nn.Sequential(nn.Identity(), model), torch.device(device), precision)
    assert PYTORCH_KERNEL.fused
    return model.attention_kernel.fused


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, False),
        ({"precision": "fp32"}, True),
        ({"device": "cuda"}, True),
        ({"tokens": 512}, True),
    ],
)
def test_only_bfloat16_on_cpus_with_few_tokens_is_trained_unfused(settings, fused):
    assert chosen(**settings) is fused
