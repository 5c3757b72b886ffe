"""Stack: each method acts at its place, on what the others left."""

import dataclasses

import pytest
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td
from tokendial.data.transforms.image import Augment
from tokendial.tasks.classification import Classification
from tokendial.train.objective import Objective

LABELS = torch.tensor([1, 4])


def stacked(*methods, dial=None, **kwargs):
    torch.manual_seed(0)
    model = td.wrap(tiny_vit(**kwargs), reduce=td.Stack(methods=methods, dial=dial)).eval()
    perturbed(model.reducer, std=0.3)
    return model


@torch.no_grad()
def test_a_block_by_hand():
    """ToMe merges after attention; of the tokens that are left, the FFN runs on DyT's choice."""
    model = stacked(td.ToMe(r=6), td.DyT(target_ratio=0.5), depth=1)
    dyt = model.reducer.methods[1]
    (merged,) = td.wrap(model.vit, reduce=td.ToMe(r=6)).eval().steps(images(), track=True)
    (step,) = model.steps(images(), track=True)
    assert torch.equal(step.tokens.origin, merged.tokens.origin)
    block = model.vit.blocks[0]
    entered = model.anatomy.embed(images()).x
    attended = entered + block.attn(block.norm1(entered))
    keys = block.attn.qkv(block.norm1(entered)).view(2, 65, 3, 3, 16)[:, :, 1].mean(2)
    left = td.Tokens(attended, prefix=1, grid=(8, 8)).apply_grouping(
        td.reduce.tome.bipartite_matching(keys, 6, num_prefix_tokens=1), track_size=True
    )
    selected = dyt.dispatchers[0](left.x).squeeze(-1) > 0
    selected[:, 0] = True
    expected = left.x + selected.unsqueeze(-1) * block.mlp(block.norm2(left.x))
    torch.testing.assert_close(step.tokens.x, expected, atol=1e-5, rtol=1e-5)
    assert selected[:, 1:].any()
    assert not selected.all()


@torch.no_grad()
def test_a_degree_that_is_off_is_the_other_method_alone():
    pair = (td.ToMe(r=5), td.FFNMerge(r=8))
    model = stacked(*pair, dial=[[5, 0], [0, 8], [5, 8]])
    assert (model.degrees, model.degree) == ((0, 1, 2, 3), 1)
    for degree, alone in ((1, pair[0]), (2, pair[1])):
        model.set_degree(degree)
        one = td.wrap(model.vit, reduce=alone).eval()
        assert torch.equal(model(images()), one(images()))
        assert model.cost().macs == one.cost().macs
    assert model.cost(3).macs < min(model.cost(1).macs, model.cost(2).macs)


@torch.no_grad()
def test_keys_follow_their_tokens_to_the_ffn():
    """FFN merging compares the merged tokens by the mean of their keys."""
    model = stacked(td.ToMe(r=10), td.FFNMerge(r=12), depth=1)
    keys = []
    ffn_merge = model.reducer.methods[1]
    run = ffn_merge.run_merged
    ffn_merge.run_merged = lambda *a: (keys.append(a[3]), run(*a))[1]
    (step,) = model.steps(images(), track=True)
    seen = {}
    for image in range(2):
        origin = step.tokens.origin[image]
        block = model.vit.blocks[0]
        normed = block.norm1(model.anatomy.embed(images()).x)
        each = block.attn.qkv(normed).view(2, 65, 3, 3, 16)[:, :, 1].mean(2)[image]
        for token in range(55):
            seen[image, token] = each[origin == token].mean(0)
    expected = torch.stack([torch.stack([seen[i, t] for t in range(55)]) for i in range(2)])
    torch.testing.assert_close(keys[0], expected, atol=1e-5, rtol=1e-5)


def test_the_first_method_is_the_dial():
    model = stacked(td.ToMe(r=4), td.DyT(target_ratio=0.5))
    assert (model.degrees, model.degree) == (td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).degrees, 4)
    dyt = td.wrap(tiny_vit(), reduce=td.DyT(target_ratio=0.5))
    assert model.reducer.table[7] == (7, dyt.degree)
    assert model.cost(4).macs < min(dyt.cost().macs, model.cost(1).macs)


@pytest.mark.parametrize(
    "pair",
    [
        (td.ToMe(r=6), td.DyT(target_ratio=0.9)),
        (td.EViT(r=4, rest="drop"), td.DyT(target_ratio=0.9)),
        (td.DynamicViT(keep_rate=0.6, layers=(2,)), td.DyT(complete=False)),
    ],
    ids=["tome", "evit", "dynamicvit"],
)
def test_the_losses_of_all_methods_train_their_weights(pair):
    losses = []
    for weight in (2.0, 4.0, 6.0):
        pair = (pair[0], dataclasses.replace(pair[1], ratio_weight=weight))
        model = stacked(*pair)
        torch.manual_seed(3)
        task = Classification(7, multi_label=False, augment=Augment())
        loss, _ = Objective(model.train(), task)(images(), LABELS)
        losses.append(loss.item())
    assert losses[1] > losses[0]  # the loss on DyT's share is part of the sum
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in model.reducer.parameters())


def test_a_stack_is_saved_and_read(tmp_path):
    model = stacked(td.ToMe(r=4), td.DyT(target_ratio=0.5), dial=[[2, 5], [4, 5]])
    model.set_degree(2)
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=tiny_vit())
    assert loaded.reduce_config == model.reduce_config
    torch.testing.assert_close(loaded(images()), model(images()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": [td.ToMe()]}, "methods must be two or more reduction methods"),
        ({"methods": 3}, "methods must be two or more reduction methods, got 3"),
        ({"methods": [td.ToMe(), "dyt"]}, "methods must be two or more"),
        (
            {"methods": [td.ToMe(), td.EViT(r=3)]},
            "ToMe and EViT both act between attention and FFN, so they cannot be stacked",
        ),
        ({"methods": [td.DyT(), td.FFNMerge()]}, "DyT and FFNMerge both act around the FFN"),
        (
            {"methods": [td.ToMe(), td.InWindows(reduce=td.ToMe(r=1))]},
            "ToMe and InWindows both act",
        ),
        ({"methods": [td.ToMe(), td.DAR()]}, "DAR reads the grid of patches, which ToMe does not"),
        ({"methods": [td.ToMe(), td.DyT()], "dial": [[1]]}, "dial must list a degree for each of"),
        ({"methods": [td.ToMe(), td.DyT()], "dial": []}, "dial must list a degree for each of"),
        (
            {"methods": [td.ToMe(), td.DyT()], "dial": [[1, 99]]},
            "dial: DyT has the degrees 0 to 9, got 99",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(tiny_vit(), reduce=td.Stack(**settings))
