import pytest
import timm
import torch
from examples import images, tiny_vit

import tokendial as td


@pytest.mark.parametrize(("r", "gmacs"), [(0, 106.2), (256, 91.8), (384, 84.5), (512, 77.3)])
def test_the_cost_of_segmentation_is_the_published_one(r, gmacs):
    with torch.device("meta"):
        vit = timm.create_model("deit_base_patch16_224", img_size=512, num_classes=0)
        model = td.wrap(vit, reduce=td.FFNMerge(r=r))
    assert model.cost().gmacs == pytest.approx(gmacs, rel=0.02)
    assert model.cost().tokens_per_layer == (1025,) * 12


@torch.no_grad()
def test_members_of_a_group_get_the_output_of_its_mean():
    vit = tiny_vit(depth=1)
    model = td.wrap(vit, reduce=td.FFNMerge(r=10))
    x = vit._pos_embed(vit.patch_embed(images()))
    block = vit.blocks[0]
    after = x + block.attn(block.norm1(x))
    keys = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1))[:, :, 1].mean(2)
    grouping = td.reduce.tome.bipartite_matching(keys, 10, num_prefix_tokens=1)
    branch = block.mlp(block.norm2(grouping.merge(after)))
    expected = after + torch.stack([b[i] for b, i in zip(branch, grouping.index, strict=True)])
    (step,) = model.steps(images())
    torch.testing.assert_close(step.tokens.x, expected)


@torch.no_grad()
def test_random_matching_costs_the_same_and_gives_something_else():
    similar, drawn = (
        td.wrap(tiny_vit(), reduce=td.FFNMerge(r=16, matching=matching))
        for matching in ("bipartite", "random")
    )
    assert drawn.cost().macs == pytest.approx(similar.cost().macs, rel=0.02)
    assert not torch.equal(similar(images()), drawn(images()))


@torch.no_grad()
def test_an_image_too_small_to_merge_is_run_as_it_is():
    vit = tiny_vit(dynamic_img_size=True)
    model = td.wrap(vit, reduce=td.FFNMerge(r=16))
    torch.testing.assert_close(model(images(1, 4, 4)), vit(images(1, 4, 4)))


@torch.no_grad()
def test_a_dial_of_steps_has_every_so_many_tokens():
    fine, coarse = (
        td.wrap(tiny_vit(), reduce=td.FFNMerge(r=24, step=step)).eval() for step in (1, 8)
    )
    assert coarse.degrees == (0, 1, 2, 3, 4)
    assert coarse.degree == 3
    assert torch.equal(coarse(images()), fine(images()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "r must be an integer of at least 0, got -1"),
        ({"step": 0}, r"step must be an integer of at least 1, got 0"),
        ({"r": 10, "step": 4}, r"step must divide r \(10\), got 4"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        td.FFNMerge(**settings)


def test_a_large_stride_merges_more_than_half():
    model = td.wrap(tiny_vit(), reduce=td.FFNMerge(r=48, stride=4))
    plain = td.wrap(tiny_vit(), reduce=td.FFNMerge(r=32))
    assert model.cost().macs < plain.cost().macs
