"""Combined: adapters that do not know of each other, in one model."""

import pytest
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td

PAIRS = {
    "prompts and bottlenecks": (td.VPT(prompts=3), td.AdaptFormer(dim=4)),
    "bottlenecks and prompts": (td.AdaptFormer(dim=4), td.VPT(prompts=3)),
    "lora and dense adapters": (td.LoRA(rank=2), td.DenseAdapter(dim=4, start=3, interval=2)),
    "prompts and dense adapters": (td.VPT(prompts=3, deep=False), td.DenseAdapter(dim=4)),
    "convpass and houlsby": (td.ConvPass(dim=4), td.Houlsby(dim=4)),
    "bypass and ssf": (td.ResTuning(dim=4), td.SSF()),
    "biases and bottlenecks": (td.BitFit(), td.AdaptFormer(dim=4)),
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def combined(*methods, reduce=None):
    torch.manual_seed(0)
    return td.wrap(tiny_vit(), reduce=reduce, adapt=td.Combined(methods=methods)).eval()


@torch.no_grad()
def test_one_that_does_nothing_leaves_the_other_alone():
    model = combined(td.AdaptFormer(dim=4), td.DenseAdapter(dim=4, start=3, interval=2))
    alone = td.wrap(tiny_vit(), adapt=td.AdaptFormer(dim=4)).eval()
    perturbed(model.adapter.methods[0])
    alone.adapter.load_state_dict(model.adapter.methods[0].state_dict())
    torch.testing.assert_close(model(images()), alone(images()))


@torch.no_grad()
def test_branches_beside_an_ffn_are_summed():
    model = combined(td.AdaptFormer(dim=4, scale=0.3), td.AdaptFormer(dim=6, scale=0.5))
    perturbed(model.adapter, std=0.2)
    vit, (first, second) = model.vit, model.adapter.methods
    x = vit._pos_embed(vit.patch_embed(images()))
    for n, block in enumerate(vit.blocks):
        u = x + block.attn(block.norm1(x))
        x = u + block.mlp(block.norm2(u))
        for adapter, scale in ((first, 0.3), (second, 0.5)):
            x = x + scale * adapter.up[n](adapter.down[n](u).relu())
    torch.testing.assert_close(model(images()), vit.forward_head(vit.norm(x)))


@each_pair
def test_all_of_them_train_and_are_saved(pair, tmp_path):
    reduce = None if td.ConvPass(dim=4) in pair else td.ToMe(r=6)
    model = combined(*pair, reduce=reduce).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model(images()).square().sum().backward()
    trained = list(model.trainable_parameters())
    assert all(p.grad is not None for p in trained)
    for method in pair:
        own = td.wrap(tiny_vit(), adapt=method)
        own_numbers = sum(p.numel() for p in own.trainable_parameters())
        assert own_numbers < sum(p.numel() for p in trained)
    expected = model.eval()(images())
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=tiny_vit()).eval()
    torch.testing.assert_close(loaded(images()), expected)
    assert loaded.adapt_config == model.adapt_config


@torch.no_grad()
def test_combined_adapters_take_turns_with_others():
    model = combined(td.LoRA(rank=2), td.AdaptFormer(dim=4))
    perturbed(model.adapter)
    first = model(images())
    model.add_adapter("other", td.AdaptFormer(dim=4))
    model.set_adapter("other")
    assert not torch.equal(model(images()), first)
    model.set_adapter("default")
    assert torch.equal(model(images()), first)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([td.LoRA()], "methods must be two or more fine-tuning methods"),
        (3, "methods must be two or more fine-tuning methods, got 3"),
        ([td.LoRA(), td.ToMe()], "methods must be two or more"),
        ([td.VPT(prompts=2), td.VPT(prompts=3, deep=False)], "2 of them add prompts; one at most"),
        ([td.VPT(prompts=2), td.NOAH(rank=0)], "2 of them add prompts; one at most"),
        ([td.LoRA(), td.SSF()], "LoRA and SSF both act inside of the backbone's layers"),
    ],
)
def test_settings_are_checked(methods, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(tiny_vit(), adapt=td.Combined(methods=methods))
