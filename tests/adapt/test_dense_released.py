"""The adapter of Sparse-Tuning's released code equals it."""

import pytest
import timm
import torch
from examples import golden, split, tiny_vit

import tokendial as td


def reference_model(rest="merge"):
    meta, tensors = golden("sparse_release")
    settings = meta["settings"]
    vit = timm.create_model("vit_tiny_patch16_224", **settings["model"])
    reduce = td.EViT(keep_rate=0.7, layers=(4, 7, 10), rest=rest)
    adapt = td.ReleasedDenseAdapter(dims=tuple(settings["bottleneck"]))
    model = td.wrap(vit, reduce=reduce, adapt=adapt).eval()
    state = split(tensors, "weight.") | split(tensors, "extra.")
    td.load_reference(model, state, system="sparse_tuning")
    return tensors, model


@torch.no_grad()
def test_one_adapter_equals_the_reference():
    tensors, model = reference_model()
    out = model.adapter.layers[0](tensors["input.adapter_x"])
    torch.testing.assert_close(out, tensors["output.adapter0"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "rest"), [("fuse", "merge"), ("nofuse", "drop")])
@torch.no_grad()
def test_the_whole_model_equals_the_reference(name, rest):
    tensors, model = reference_model(rest)
    expected = split(tensors, f"output.sched_{name}.")
    torch.testing.assert_close(model(tensors["input"]), expected["logits"], atol=2e-4, rtol=0)
    steps = list(model.steps(tensors["input"]))
    counts = [step.tokens.x.shape[1] for step in steps]
    assert counts == expected["tokens_per_layer"].tolist()
    # Kept tokens with nearly equal scores may stand in another order.
    ours, theirs = steps[-1].tokens.x, expected["final_tokens"]
    ours, theirs = (x.flatten(1).sort().values for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="dims must be two widths, got 64"):
        td.ReleasedDenseAdapter(dims=64)
    with pytest.raises(ValueError, match="needs a number of blocks that 4 divides, got 3"):
        td.wrap(tiny_vit(depth=3), adapt=td.ReleasedDenseAdapter())
