import copy

import pytest
import timm
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td


@torch.no_grad()
def test_outputs_follow_the_equations_with_a_reduction_in_between():
    """Six layers, EViT at layer 4, written out from the definition."""
    vit = tiny_vit(depth=6)
    model = td.wrap(
        vit, reduce=td.EViT(keep_rate=[0.5], layers=(4,)), adapt=td.DenseAdapter(dim=5, scale=0.7)
    )
    perturbed(model.adapter, std=0.3)
    adapters = model.adapter.layers
    x = vit._pos_embed(vit.patch_embed(images()))
    z = {}
    for n in range(1, 7):
        block, adapter = vit.blocks[n - 1], adapters[n - 1]
        u = x + block.attn(block.norm1(x))
        if n == 4:
            q, k, _ = block.attn.qkv(block.norm1(x)).reshape(2, 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / 4).softmax(-1).mean(1)[:, 0, 1:]
            order = scores.argsort(descending=True)

            def reduced(y, order=order, scores=scores):
                rows = torch.stack([y[b, 1:][order[b]] for b in range(2)])
                weights = scores.gather(1, order)[:, 32:, None]
                rest = (rows[:, 32:] * weights).sum(1, keepdim=True)
                return torch.cat([y[:, :1], rows[:, :32], rest], dim=1)

            u, z = reduced(u), {m: reduced(y) for m, y in z.items()}
        h = adapter["down"][0](u)
        if n > 1:
            h = h + adapter["down"][1](z[n - 1])
        if n >= 4:
            h = h + adapter["down"][2](z[n - 3])
        z[n] = 0.7 * adapter["up"][0](h.relu())
        x = u + block.mlp(block.norm2(u)) + z[n]
    torch.testing.assert_close(model(images()), vit.forward_head(vit.norm(x)))


def test_parameters_of_sparse_tuning_on_vit_base():
    with torch.device("meta"):
        model = td.wrap(timm.create_model("vit_base_patch16_224"), adapt=td.DenseAdapter(dim=32))
    # 12 up and 32 down projections, a bias for each.
    assert model.cost().trainable_params == 44 * 768 * 32 + 32 * 32 + 12 * 768


def test_only_what_is_read_later_is_carried(vit):
    model = td.wrap(vit, adapt=td.DenseAdapter(dim=4))
    carried = [set(step.tokens.carried) for step in model.steps(images())]
    assert [len(names) for names in carried] == [1, 2, 3, 3]


@pytest.mark.parametrize("fusion", ["input", "inner", "output"])
@pytest.mark.parametrize("reads", [(), ("previous",), ("earlier",), ("previous", "earlier")])
def test_variants_have_the_matrices_of_the_paper(fusion, reads):
    with torch.device("meta"):
        adapt = td.DenseAdapter(dim=32, fusion=fusion, reads=reads)
        model = td.wrap(timm.create_model("vit_base_patch16_224"), adapt=adapt)
    inputs = 12 + 11 * ("previous" in reads) + 9 * ("earlier" in reads)
    downs = 12 if fusion == "input" else inputs
    ups = inputs if fusion == "output" else 12
    expected = (downs + ups) * 768 * 32 + downs * 32 + ups * 768
    assert model.cost().trainable_params == expected


@pytest.mark.parametrize("fusion", ["input", "output"])
@torch.no_grad()
def test_features_are_summed_up_where_the_fusion_says(fusion):
    vit = tiny_vit(depth=2)
    model = td.wrap(vit, adapt=td.DenseAdapter(dim=5, fusion=fusion))
    perturbed(model.adapter, std=0.3)
    _, second = model.eval().adapter.layers
    tokens = [step.tokens for step in model.steps(images())]
    z = tokens[0].carried["dense_adapter-1"]
    entered = tokens[0].x + vit.blocks[1].attn(vit.blocks[1].norm1(tokens[0].x))
    if fusion == "input":
        expected = second["up"][0](second["down"][0](entered + z).relu())
    else:
        expected = sum(
            up(down(x).relu())
            for up, down, x in zip(second["up"], second["down"], (entered, z), strict=True)
        )
    torch.testing.assert_close(tokens[1].carried["dense_adapter-1"], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reads": ("next",)}, "reads must be one of previous, earlier, got 'next'"),
        ({"fusion": "outer"}, "fusion must be one of input, inner, output, got 'outer'"),
    ],
)
def test_unknown_variants_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        td.DenseAdapter(**settings)


def test_the_published_count_has_one_more_vector_in_each_layer():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
        model = td.wrap(vit, adapt=td.DenseAdapter(dim=32, channel_scale=True))
    assert model.cost().trainable_params == 44 * 768 * 32 + 32 * 32 + 2 * 12 * 768
    assert round(model.cost().trainable_params / 1e6, 2) == 1.10


@torch.no_grad()
def test_the_channel_scale_multiplies_what_is_added_and_read(vit):
    model = td.wrap(vit, adapt=td.DenseAdapter(dim=5, channel_scale=True))
    perturbed(model.adapter, std=0.3)
    scales = list(model.adapter.channel_scales)
    ups = [layer["up"][0] for layer in model.adapter.layers]
    plain = td.wrap(copy.deepcopy(vit), adapt=td.DenseAdapter(dim=5))
    plain.adapter.load_state_dict(model.adapter.state_dict(), strict=False)
    for layer, up, scale in zip(plain.adapter.layers, ups, scales, strict=True):
        layer["up"][0].weight.copy_(up.weight * scale[:, None])
        layer["up"][0].bias.copy_(up.bias * scale)
    torch.testing.assert_close(model(images()), plain(images()))


@torch.no_grad()
def test_the_first_long_connection_may_reach_back_to_the_embedded_tokens(vit):
    model = td.wrap(vit, adapt=td.DenseAdapter(dim=5, start=3, interval=3, reads=("earlier",)))
    perturbed(model.adapter, std=0.3)
    embedded = x = vit._pos_embed(vit.patch_embed(images()))
    z = {0: embedded}
    for n, (block, adapter) in enumerate(zip(vit.blocks, model.adapter.layers, strict=True), 1):
        u = x + block.attn(block.norm1(x))
        h = adapter["down"][0](u)
        if n >= 3:
            h = h + adapter["down"][1](z[n - 3])
        z[n] = adapter["up"][0](h.relu())
        x = u + block.mlp(block.norm2(u)) + z[n]
    torch.testing.assert_close(model(images()), vit.forward_head(vit.norm(x)))
