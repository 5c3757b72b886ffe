import pytest
import timm
import torch
from examples import perturbed
from timm.layers.attention import Attention

from tokendial.attention import attend

BOTH = frozenset({"mean_keys", "class_attention"})


@pytest.fixture
def layer() -> Attention:
    layer = Attention(24, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm)
    return perturbed(layer, std=0.3)


def tokens(count: int = 9) -> torch.Tensor:
    return torch.randn(2, count, 24, generator=torch.Generator().manual_seed(0))


def softmax_rows(layer: Attention, x: torch.Tensor, bias: torch.Tensor | None = None):
    """Attention [B, H, N, N] and keys, from the definition."""
    q, k, _ = layer.qkv(x).reshape(2, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = q @ k.transpose(-2, -1) * 8**-0.5
    return (logits if bias is None else logits + bias).softmax(-1), k


def test_output_equals_the_layer_itself(layer):
    x = tokens()
    torch.testing.assert_close(attend(layer, x).out, layer(x))


@pytest.mark.parametrize("options", [{"gated": True}, {"scale_norm": True}])
def test_gate_and_norm_of_the_layer_are_applied(options):
    layer = Attention(24, num_heads=3, norm_layer=torch.nn.LayerNorm, **options)
    layer = perturbed(layer, std=0.3)
    torch.testing.assert_close(attend(layer, tokens()).out, layer(tokens()))


def test_by_products_are_read_only_when_asked_for(layer):
    attended = attend(layer, tokens())
    assert attended.mean_keys is None
    assert attended.class_attention is None


def test_class_attention_is_the_first_row_averaged_over_heads(layer):
    attended = attend(layer, tokens(), needs=BOTH)
    rows, _ = softmax_rows(layer, tokens())
    torch.testing.assert_close(attended.class_attention, rows.mean(1)[:, 0])


def test_mean_keys_are_keys_averaged_over_heads(layer):
    attended = attend(layer, tokens(), needs=BOTH)
    torch.testing.assert_close(attended.mean_keys, softmax_rows(layer, tokens())[1].mean(1))


def test_a_token_of_size_two_weighs_like_two_equal_tokens(layer):
    x = tokens(5)
    doubled = torch.cat([x, x[:, 4:]], dim=1)
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]]).expand(2, -1)
    merged = attend(layer, x, size_BN=size, needs=BOTH)
    torch.testing.assert_close(merged.out, attend(layer, doubled).out[:, :5])
    rows, _ = softmax_rows(layer, x, size.log()[:, None, None, :])
    torch.testing.assert_close(merged.class_attention, rows.mean(1)[:, 0])


def test_lora_in_the_layer_acts():
    import peft

    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, vit)
    layer, x = vit.blocks[0].attn.eval(), torch.randn(1, 4, 192)
    torch.testing.assert_close(attend(layer, x).out, layer(x))
