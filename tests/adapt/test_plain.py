from examples import tiny_vit

import tokendial as td


def test_linear_trains_the_head_alone():
    model = td.wrap(tiny_vit(), adapt=td.LinearProbe())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"vit.head.weight", "vit.head.bias"}
    assert model.cost().trainable_params == 0


def test_full_trains_everything():
    model = td.wrap(tiny_vit().requires_grad_(False), adapt=td.FullFineTuning())
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_method_nothing_is_frozen_or_thawed():
    vit = tiny_vit()
    vit.patch_embed.requires_grad_(False)
    td.wrap(vit)
    assert not vit.patch_embed.proj.weight.requires_grad
    assert vit.head.weight.requires_grad
