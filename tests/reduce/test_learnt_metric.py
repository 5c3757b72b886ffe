"""LearntMetric: the relaxed merge equals the reference; matching equals ToMe's on its metric."""

import pytest
import torch
from examples import golden, images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.reduce.learnt_metric import relaxed_pairs, soft_matching
from tokendial.reduce.tome import bipartite_matching
from tokendial.tokens import Tokens


def test_a_soft_merge_equals_the_reference():
    meta, tensors = golden("dtem_soft_merge")
    settings = meta["settings"]
    metric = tensors["input.metric"].requires_grad_()
    grouping = soft_matching(
        metric,
        tensors["input.size"],
        settings["r"],
        num_prefix_tokens=1,
        num_active=settings["active"] - 1,
        targets=settings["k2"],
        temperatures=(settings["tau1"], settings["tau2"]),
    )
    tokens = Tokens(tensors["input.x"], prefix=1, grid=(4, 5), size=tensors["input.size"])
    merged = tokens.apply_grouping(grouping, track_size=True)
    torch.testing.assert_close(merged.x, tensors["output.x"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.size, tensors["output.size"], atol=1e-5, rtol=1e-5)
    loss = (merged.x.square() * merged.size.unsqueeze(-1)).sum()
    (gradient,) = torch.autograd.grad(loss, metric)
    torch.testing.assert_close(gradient, tensors["output.metric_grad"], atol=1e-5, rtol=1e-4)


@given(
    seed=st.integers(0, 99),
    sources=st.integers(1, 9),
    targets=st.integers(1, 9),
    r=st.integers(1, 9),
    sharp=st.booleans(),
)
def test_shares_are_those_of_about_r_pairs(seed, sources, targets, r, sharp):
    similarity = torch.rand(
        2, sources, targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    pairs = relaxed_pairs(similarity, r, 3, (0.01, 0.01) if sharp else (1.0, 1.0))
    of_source = pairs.sum(-1)
    assert (pairs >= 0).all()
    assert (of_source <= 1 + 1e-6).all()
    assert (of_source.sum(-1) <= min(r, sources) + 1e-6).all()
    assert ((pairs > 0).sum(-1) <= 3).all()


def test_sharp_shares_are_the_pairs_that_matching_merges():
    """At a low temperature training merges what inference merges, with the same sources."""
    torch.manual_seed(0)
    metric = torch.randn(1, 13, 6)
    grouping = soft_matching(
        metric,
        torch.ones(1, 13),
        3,
        num_prefix_tokens=1,
        num_active=12,
        targets=3,
        temperatures=(1.0, 0.001),
    )
    # With two prefix tokens, ToMe's sources are the patches 0, 2, ..., as in training.
    hard = bipartite_matching(torch.cat([metric[:, :1], metric], 1), 3, num_prefix_tokens=2)
    source, target = grouping.moved[0].round().nonzero(as_tuple=True)
    absorbing = hard.keep.gather(1, hard.dst)
    assert {*zip((2 * source).tolist(), (2 * target + 1).tolist(), strict=True)} == {
        *zip((hard.src - 2)[0].tolist(), (absorbing - 2)[0].tolist(), strict=True)
    }


@torch.no_grad()
def test_inference_is_tome_by_the_learnt_metric():
    model = td.wrap(tiny_vit(depth=2), reduce=td.LearntMetric(r=5)).eval()
    block = model.vit.blocks[0]
    entered = model.anatomy.embed(images()).x
    metric = model.reducer.metrics[0](block.norm1(entered))
    expected = bipartite_matching(metric, 5, num_prefix_tokens=1)
    x = entered + block.attn(block.norm1(entered))
    merged = Tokens(x, prefix=1, grid=(8, 8)).apply_grouping(expected, track_size=True)
    (first, *_) = model.steps(images())
    torch.testing.assert_close(
        first.tokens.x, merged.x + block.mlp(block.norm2(merged.x)), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(first.tokens.size, merged.size)


def test_training_keeps_all_tokens_and_the_patches_that_they_stand_for():
    model = td.wrap(tiny_vit(depth=3), reduce=td.LearntMetric(r=6)).train()
    for step in model.steps(images(), track=True):
        tokens = step.tokens
        assert tokens.x.shape[1] == 65
        torch.testing.assert_close(tokens.size.sum(1), torch.full((2,), 65.0), atol=1e-2, rtol=0)
        assert sorted(tokens.origin[0].tolist()) == list(range(65))
    moved = (tokens.size[:, 1:] < 0.5).sum(1)
    assert (moved >= 6).all()


def test_the_metric_learns_on_a_frozen_backbone():
    """Its gradient leads to a lower loss, and the backbone gets none."""
    torch.manual_seed(0)
    model = td.wrap(tiny_vit(depth=3), reduce=td.LearntMetric(r=12)).train()
    pictures, labels = images(8), torch.arange(8) % 7
    trained = [p for p in model.trainable_parameters() if p.shape[-1] != 7]
    assert {id(p) for p in model.reducer.parameters()} <= {id(p) for p in trained}
    optimizer = torch.optim.Adam(model.reducer.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in model.reducer.metrics[0].parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "r must be an integer of at least 0"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"targets": 0}, "targets must be an integer of at least 1, got 0"),
        ({"temperatures": 0.1}, "temperatures must be two numbers above 0, got 0.1"),
        ({"temperatures": (0.1, 0.0)}, r"temperatures must be two numbers above 0, got \(0.1, 0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        td.LearntMetric(**settings)
