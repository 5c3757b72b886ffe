import pytest
import torch

from tokendial import attention
from tokendial.attention import BY_PRODUCTS, AttentionKernel, attend


def qkv(count: int = 9) -> torch.Tensor:
    """Queries, keys and values of 2 images, 3 heads of width 8."""
    return torch.randn(3, 2, 3, count, 8, generator=torch.Generator().manual_seed(0))


def weights(q, k, bias=0.0):
    """Attention [B, H, N, N] from the definition."""
    return (q @ k.transpose(-2, -1) * 8**-0.5 + bias).softmax(-1)


def test_output_is_the_weighted_mean_of_the_values():
    q, k, v = qkv()
    expected = (weights(q, k) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v)[0], expected)


def test_by_products_are_read_only_when_asked_for():
    _, attended = attend(*qkv())
    assert all(getattr(attended, name) is None for name in BY_PRODUCTS)


def test_by_products_are_what_they_are_called():
    q, k, v = qkv()
    rows, (_, attended) = weights(q, k), attend(q, k, v, needs=BY_PRODUCTS)
    torch.testing.assert_close(attended.attention, rows)
    torch.testing.assert_close(attended.class_attention, rows.mean(1)[:, 0])
    torch.testing.assert_close(attended.mean_attention, rows.mean((1, 2)))
    torch.testing.assert_close(attended.mean_keys, k.mean(1))


def test_a_token_of_size_two_weighs_like_two_equal_tokens():
    q, k, v = qkv(5)
    doubled = [torch.cat([part, part[:, :, 4:]], dim=2) for part in (q, k, v)]
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]]).expand(2, -1)
    out, merged = attend(q, k, v, size_BM=size, needs=BY_PRODUCTS)
    torch.testing.assert_close(out, attend(*doubled)[0][:, :5])
    rows = weights(q, k, size.log()[:, None, None, :])
    torch.testing.assert_close(merged.class_attention, rows.mean(1)[:, 0])


@pytest.mark.parametrize("most", [1, 100, 10**9])
@pytest.mark.parametrize("sized", [False, True])
def test_matrix_products_give_what_the_fused_kernel_does(sized, most, monkeypatch):
    monkeypatch.setattr(attention, "_MAX_WEIGHTS", most)
    q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in qkv(6))
    size = 1 + 3 * torch.rand(2, 6) if sized else None
    for multiple in (1, 4):
        fused, _ = attend(q, k, v, size_BM=size, kernel=AttentionKernel(key_multiple=multiple))
        same, _ = attend(
            q, k, v, size_BM=size, kernel=AttentionKernel(key_multiple=multiple, fused=False)
        )
        torch.testing.assert_close(same, fused)


@pytest.mark.parametrize("sized", [False, True])
def test_surplus_keys_change_nothing(sized):
    q, k, v = qkv(6)
    size = 1 + 3 * torch.rand(2, 6) if sized else None
    out, plain = attend(q, k, v, size_BM=size, needs=BY_PRODUCTS)
    same, padded = attend(
        q, k, v, size_BM=size, needs=BY_PRODUCTS, kernel=AttentionKernel(key_multiple=4)
    )
    torch.testing.assert_close(same, out)
    for name in BY_PRODUCTS:
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sizes_in_the_keys_weigh_like_a_mask(fused, scale):
    q, k, v = qkv(6)
    size = 1 + 3 * torch.rand(2, 6)
    settings = {"size_BM": size, "scale": scale, "needs": BY_PRODUCTS}
    out, plain = attend(q, k, v, **settings, kernel=AttentionKernel(fused=fused))
    kernel = AttentionKernel(fused=fused, sizes_in_keys=True, key_multiple=4)
    same, in_keys = attend(q, k, v, **settings, kernel=kernel)
    torch.testing.assert_close(same, out)
    for name in BY_PRODUCTS:
        torch.testing.assert_close(getattr(in_keys, name), getattr(plain, name))


def fused_in_training(dtype=torch.bfloat16, count=9, kernel=None):
    """Whether the backward pass is that of fused attention; its gradients are compared as well."""
    parts = [part.to(dtype).requires_grad_() for part in qkv(count)]
    out, _ = attend(*parts, kernel=kernel or AttentionKernel())
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = attend(*exact, kernel=AttentionKernel(fused=True))[0]
    # The sum of all outputs would have no gradient in the queries.
    factor = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    tolerance = 0.05 if dtype.itemsize == 2 else 1e-4
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    given = torch.autograd.grad((out.double() * factor).sum(), parts)
    for gradient, other in zip(
        given, torch.autograd.grad((wanted * factor).sum(), exact), strict=True
    ):
        torch.testing.assert_close(gradient.double(), other, atol=tolerance, rtol=tolerance)
    return any("ScaledDotProduct" in name for name in names)


def test_only_half_precision_with_few_tokens_is_trained_unfused_on_a_cpu():
    """There PyTorch's fused backward pass is slow; elsewhere it is the faster one."""
    assert not fused_in_training(torch.bfloat16)
    assert not fused_in_training(torch.float16)
    assert fused_in_training(torch.float32)
    assert fused_in_training(torch.bfloat16, count=513)
    assert fused_in_training(torch.bfloat16, kernel=AttentionKernel(fused=True))
    assert not fused_in_training(torch.float32, kernel=AttentionKernel(fused=False))


def test_a_policy_hides_tokens_from_all_others():
    q, k, v = qkv(6)
    policy = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]]).expand(2, -1)
    kept = [part[:, :, policy[0] > 0] for part in (q, k, v)]
    out = attend(q, k, v, policy_BN=policy)[0][:, policy[0] > 0]
    torch.testing.assert_close(out, attend(*kept)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [3, 6])
def test_queries_that_are_no_tokens_read_the_kept_ones_only(count):
    q, k, v = qkv(6)
    policy = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]]).expand(2, -1)
    kept = [part[:, :, policy[0] > 0] for part in (k, v)]
    out, _ = attend(q[:, :, :count], k, v, policy_BN=policy, of_tokens=False)
    torch.testing.assert_close(out, attend(q[:, :, :count], *kept)[0], atol=1e-5, rtol=0)


def test_the_scale_is_the_one_given():
    q, k, v = qkv()
    out, attended = attend(q, k, v, scale=1.0, needs=BY_PRODUCTS)
    torch.testing.assert_close(attended.attention, (q @ k.transpose(-2, -1)).softmax(-1))
    expected = (attended.attention @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
