import timm
import torch
from examples import images, perturbed

import tokendial as td


@torch.no_grad()
def test_the_branch_reads_what_enters_the_ffn(vit):
    model = td.wrap(vit, adapt=td.AdaptFormer(dim=5, scale=0.3))
    perturbed(model.adapter, std=0.3)
    x = vit._pos_embed(vit.patch_embed(images()))
    for block, down, up in zip(vit.blocks, model.adapter.down, model.adapter.up, strict=True):
        u = x + block.attn(block.norm1(x))
        x = u + block.mlp(block.norm2(u)) + 0.3 * up(down(u).relu())
    torch.testing.assert_close(model(images()), vit.forward_head(vit.norm(x)))


def test_parameters_and_cost_on_vit_base():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        cost = td.wrap(vit, adapt=td.AdaptFormer(dim=64)).cost()
    assert cost.trainable_params == 12 * (2 * 768 * 64 + 64 + 768)
    assert round(cost.gmacs, 2) == 17.81


@torch.no_grad()
def test_experts_are_mixed_for_each_image_by_the_mean_of_its_tokens(vit):
    model = td.wrap(vit, adapt=td.AdaptFormer(dim=5, scale=0.3, experts=3))
    perturbed(model.adapter, std=0.3)
    experts, routers = model.adapter.experts, model.adapter.routers

    def mixed(image):
        x = vit._pos_embed(vit.patch_embed(image[None]))
        for n, block in enumerate(vit.blocks):
            u = x + block.attn(block.norm1(x))
            shares = routers[n](u[0].mean(0)).softmax(0)
            down, up = (
                [
                    sum(
                        a * getattr(expert, side)[n].get_parameter(kind)
                        for a, expert in zip(shares, experts, strict=True)
                    )
                    for kind in ("weight", "bias")
                ]
                for side in ("down", "up")
            )
            branch = torch.nn.functional.linear(torch.nn.functional.linear(u, *down).relu(), *up)
            x = u + block.mlp(block.norm2(u)) + 0.3 * branch
        return vit.forward_head(vit.norm(x))

    batch = images()
    expected = torch.cat([mixed(image) for image in batch])
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_parameters_and_cost_of_dyt_with_experts():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        adapt = td.AdaptFormer(dim=64, experts=4)
        model = td.wrap(vit, adapt=adapt, reduce=td.DyT(selection="topk"))
    one = 12 * (2 * 768 * 64 + 64 + 768)
    assert sum(p.numel() for p in model.adapter.parameters()) == 4 * one + 12 * (768 * 4 + 4)
    assert round(4 * one / 1e6 + 12 * (768 * 4 + 4) / 1e6, 2) == 4.80
    assert abs(model.cost().gmacs / 12.29 - 1) < 0.02
