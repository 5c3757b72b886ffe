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
