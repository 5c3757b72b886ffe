import pytest
import timm
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("layer_norm", ["in", "out"])
@torch.no_grad()
def test_a_layer_norm_and_learnt_scales_are_read_from_released_files(vit, layer_norm):
    """The names are those of the authors' code; what they do is written out by hand."""
    adapt = td.AdaptFormer(dim=5, scale="learnt", layer_norm=layer_norm)
    model = td.wrap(vit, reduce=td.DyT(target_ratio=1.0), adapt=adapt)
    state = dict(vit.state_dict())
    for n in range(4):
        state[f"blocks.{n}.adaptmlp.down_proj.weight"] = torch.randn(5, 48)
        state[f"blocks.{n}.adaptmlp.down_proj.bias"] = torch.randn(5)
        state[f"blocks.{n}.adaptmlp.up_proj.weight"] = torch.randn(48, 5)
        state[f"blocks.{n}.adaptmlp.up_proj.bias"] = torch.randn(48)
        state[f"blocks.{n}.adaptmlp.adapter_layer_norm_before.weight"] = torch.rand(48) + 0.5
        state[f"blocks.{n}.adaptmlp.adapter_layer_norm_before.bias"] = torch.randn(48)
        state[f"blocks.{n}.adaptmlp.scale"] = torch.rand(1)
        state[f"blocks.{n}.mlp_token_select.mlp_head.weight"] = torch.zeros(1, 48)
        state[f"blocks.{n}.mlp_token_select.mlp_head.bias"] = torch.ones(1)
    td.load_reference(model, state, system="dyt")
    x = vit._pos_embed(vit.patch_embed(images()))
    for n, block in enumerate(vit.blocks):
        own = {
            name.removeprefix(f"blocks.{n}.adaptmlp."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{n}.adaptmlp.")
        }

        def norm(u, own=own):
            name = "adapter_layer_norm_before"
            return F.layer_norm(u, (48,), own[f"{name}.weight"], own[f"{name}.bias"])

        u = x + block.attn(block.norm1(x))
        seen = norm(u) if layer_norm == "in" else u
        hidden = F.linear(seen, own["down_proj.weight"], own["down_proj.bias"]).relu()
        branch = own["scale"] * F.linear(hidden, own["up_proj.weight"], own["up_proj.bias"])
        branch = norm(branch) if layer_norm == "out" else branch
        x = u + block.mlp(block.norm2(u)) + branch
    expected = vit.forward_head(vit.norm(x))
    torch.testing.assert_close(model.eval()(images()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "adapt",
    [
        td.AdaptFormer(dim=64, dropout=0.5),
        td.AdaptFormer(dim=64, experts=2, dropout=0.5),
        td.ConvPass(dim=64, dropout=0.5),
        td.FacT(rank=64, dropout=0.5),
    ],
)
@torch.no_grad()
def test_dropout_is_for_training_and_keeps_the_mean(vit, adapt):
    """One block, so that its branch is all that varies; the mean of many passes is near."""
    vit.blocks = vit.blocks[:1]
    model = td.wrap(vit, adapt=adapt)
    perturbed(model.adapter, std=0.02)
    exact = model.eval().forward_features(images())
    assert torch.equal(exact, model.forward_features(images()))
    torch.manual_seed(0)
    passes = torch.stack([model.train().forward_features(images()) for _ in range(60)])
    assert passes.std(0).mean() > 1e-5
    error = (passes.mean(0) - exact).abs().mean()
    assert error < passes.std(0).mean()


def test_experts_go_without_a_layer_norm_and_learnt_scales():
    with pytest.raises(ValueError, match="experts above 1 need a number as scale and layer_norm"):
        td.AdaptFormer(experts=2, scale="learnt")
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        td.AdaptFormer(dropout=1.0)


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
