"""Fused kernels give what plain PyTorch gives. Run by `test_kernels.py`, in a process of its own.

Triton decides once in a process, when it is imported, whether it compiles or interprets.
"""

import pytest
import torch
from examples import images, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokendial as td
from tokendial.kernels import launch, use_fused_kernels
from tokendial.reduce.tome import find_most_similar
from tokendial.tokens import Grouping
from tokendial.tune import treatments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
few = settings(derandomize=True, deadline=None, max_examples=15)
METHODS = {
    "bipartite": td.ToMe(r=4),
    "k-th": td.ToMe(r=10, stride=3),
    "random": td.ToMe(r=3, matching="random"),
    "fused token": td.EViT(keep_rate=0.6, layers=(1, 2)),
    "FFN": td.FFNMerge(r=8),
}


@st.composite
def reductions(draw: st.DrawFn) -> tuple[Grouping, Tensor, Tensor | None]:
    """Any grouping, with dropped tokens and groups of all sizes; matching features and weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    num_groups, num_absorbed = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    num_tokens = num_groups + num_absorbed + draw(st.integers(0, 3))
    order = torch.rand(2, num_tokens, generator=generator).argsort()
    if draw(st.booleans()):  # the same for both images, and nothing is copied
        order = order[:1].expand(2, -1)
    keep, src = order[:, :num_groups], order[:, num_groups : num_groups + num_absorbed]
    dst = torch.randint(num_groups, src.shape, generator=generator)
    width = draw(st.sampled_from([1, 7, 192, 300]))
    x = torch.randn(2, width, num_tokens, generator=generator).transpose(1, 2)
    x = x if draw(st.booleans()) else x.contiguous()
    x = x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    weight = torch.rand(2, num_tokens, generator=generator) + 0.1 if draw(st.booleans()) else None
    how = draw(st.sampled_from(["mean", "sum"]))
    grouping = Grouping(keep.to(DEVICE), src.to(DEVICE), dst.to(DEVICE), num_tokens, None, how)
    return grouping, x.to(DEVICE), None if weight is None else weight.to(DEVICE)


@few
@given(reductions())
@torch.no_grad()
def test_merging_equals_the_plain_path(example):
    grouping, x, weight = example
    with use_fused_kernels():
        merged = grouping.merge(x, weight)
    # Kernels sum in float32; plain half precision rounds in between.
    plain = grouping.merge(x.float(), weight)
    torch.testing.assert_close(merged, plain.to(x.dtype))


@few
@given(reductions())
@torch.no_grad()
def test_tokens_that_absorb_nothing_stay_as_they_are_in_a_mean(example):
    grouping, x, weight = example
    grouping.how = "mean"
    with use_fused_kernels():
        merged = grouping.merge(x, weight)
    for image in range(2):
        for group, kept in enumerate(grouping.keep[image]):
            if not (grouping.dst[image] == group).any():
                assert torch.equal(merged[image, group], x[image, kept])


@few
@given(
    num_tokens=st.sampled_from([1, 9, 64, 150]),  # up to three blocks of targets
    stride=st.integers(1, 3),
    width=st.sampled_from([3, 16, 40]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_the_first_of_the_most_similar_targets_is_found(num_tokens, stride, width, seed):
    generator = torch.Generator().manual_seed(seed)
    # Cosines of axes are 1, 0 or -1, so most are ties. Zeros have none.
    axes = torch.cat([torch.eye(width), -torch.eye(width), torch.zeros(1, width)])
    metric = axes[torch.randint(len(axes), (2, num_tokens), generator=generator)].to(DEVICE)
    source = torch.arange(num_tokens, device=DEVICE)
    target = source[::stride]
    best, partner = find_most_similar(metric, source, target)
    with use_fused_kernels():
        fused_best, fused_partner = find_most_similar(metric, source, target)
    torch.testing.assert_close(fused_best, best, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(fused_partner, partner)


@few
@given(num_tokens=st.integers(2, 150), width=st.sampled_from([3, 16, 40]), seed=st.integers(0, 99))
@torch.no_grad()
def test_the_most_similar_target_is_found_among_any(num_tokens, width, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, num_tokens, width, generator=generator).to(DEVICE)
    order = torch.randperm(num_tokens, generator=generator).to(DEVICE)
    source, target = order.tensor_split(2)
    best, _ = find_most_similar(metric, source, target)
    with use_fused_kernels():
        fused_best, partner = find_most_similar(metric, source, target)
    torch.testing.assert_close(fused_best, best)
    found = metric[torch.arange(2, device=DEVICE)[:, None], target[partner]]
    torch.testing.assert_close(torch.cosine_similarity(metric[:, source], found, dim=-1), best)


def tiny_model(reduce):
    model = td.wrap(tiny_vit(img_size=16, depth=2), reduce=reduce)
    return model.to(DEVICE).eval(), images(2, 16, 16).to(DEVICE)


@pytest.mark.parametrize("reduce", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_models_give_the_same_logits(reduce):
    model, x = tiny_model(reduce)
    plain = model(x)
    with use_fused_kernels():
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_optimising_tries_the_kernels(monkeypatch):
    monkeypatch.setattr(treatments, "_MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(treatments, "_TURNS", 1)
    started = []
    start = launch._start
    monkeypatch.setattr(launch, "_start", lambda *a, **k: (started.append(a[0]), start(*a, **k)))
    model, x = tiny_model(td.ToMe(r=4))
    fast = td.optimize(model, x)
    assert fast.trials[-1].name == "fused reduction"
    assert fast.trials[-1].kept
    started.clear()
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=0)
    assert {kernel.__name__ for kernel in started} == {"most_similar_program", "merge_program"}
