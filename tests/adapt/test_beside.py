"""Adapters written out from their definitions, on a ViT of one or two blocks."""

import pytest
import torch
import torch.nn.functional as F
from examples import images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td
from tokendial.model import blocks
from tokendial.show import token_maps


def wrapped(adapt, depth=1, **kwargs):
    model = td.wrap(tiny_vit(depth=depth, **kwargs), adapt=adapt).eval()
    perturbed(model.adapter, std=0.3)
    return model, model.vit


def embedded(vit):
    return vit._pos_embed(vit.patch_embed(images()))


def halves(vit, x):
    """Tokens after attention of the only block, and the input and output of its FFN."""
    (block,) = vit.blocks
    u = x + block.attn(block.norm1(x))
    normed = block.norm2(u)
    return u, normed, block.mlp(normed)


def logits(vit, x):
    return vit.forward_head(vit.norm(x))


@torch.no_grad()
def test_houlsby_acts_on_the_output_of_the_ffn():
    model, vit = wrapped(td.Houlsby(dim=5, scale=0.5))
    (down,), (up,) = model.adapter.down, model.adapter.up
    u, _, out = halves(vit, embedded(vit))
    expected = u + out + 0.5 * up(down(out).relu())
    torch.testing.assert_close(model(images()), logits(vit, expected))


@torch.no_grad()
def test_deep_prompts_are_new_in_every_block():
    model, vit = wrapped(td.VPT(prompts=3), depth=2)
    x = embedded(vit)
    for block, prompts in zip(vit.blocks, model.adapter.prompts, strict=True):
        x = block(torch.cat([x[:, :1], prompts.expand(2, -1, -1), x[:, 1:]], dim=1))
        x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
    torch.testing.assert_close(model(images()), logits(vit, x))


@torch.no_grad()
def test_shallow_prompts_go_through_the_whole_model():
    model, vit = wrapped(td.VPT(prompts=3, deep=False), depth=2, global_pool="avg")
    x = embedded(vit)
    prompts = model.adapter.prompts[0].expand(2, -1, -1)
    x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
    for block in vit.blocks:
        x = block(x)
    x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
    torch.testing.assert_close(model(images()), logits(vit, x))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("reduce", [td.ToMe(r=6), td.EViT(keep_rate=0.5, layers=(1, 2))])
@torch.no_grad()
def test_prompts_are_never_reduced_and_positions_are_found_again(reduce, deep):
    vit = tiny_vit(depth=2, reg_tokens=2)
    model = td.wrap(vit, reduce=reduce, adapt=td.VPT(prompts=5, deep=deep)).eval()
    *_, last = model.steps(images(), track=True)
    assert last.tokens.prefix == 3
    held = last.tokens.origin
    assert torch.equal(held[:, :3], torch.arange(3).expand(2, -1))
    assert (held[:, 3:] >= 3).all()
    assert held.max() == last.tokens.x.shape[1] - 1
    for feature_map in model.feature_maps(images(), [1, 2]):
        assert feature_map.shape == (2, 48, 8, 8)
    assert token_maps(model, images(1)[0]).origin[0].shape == (8, 8)


@pytest.mark.parametrize("name", ["dinov3", "eva02", "rope mixed"])
@torch.no_grad()
def test_prompts_do_not_shift_rotary_positions(name, monkeypatch):
    # Prompts that no token attends to leave the outputs unchanged.
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.VPT(prompts=2)).eval()
    without = td.wrap(vit, reduce=td.ToMe(r=2)).eval()
    model.set_degree(0)
    without.set_degree(0)
    attend = blocks.attend

    def without_prompts(q, k_BHMC, v_BHMC, **options):
        first = model.anatomy.shape.num_prefix_tokens
        k, v = k_BHMC, v_BHMC
        if q.shape[2] > without_tokens:
            k, v = (torch.cat([p[:, :, :first], p[:, :, first + 2 :]], 2) for p in (k, v))
        return attend(q, k, v, **options)

    without_tokens = without.anatomy.embed(images(2, *size)).x.shape[1]
    expected = without(images(2, *size))
    monkeypatch.setattr(blocks, "attend", without_prompts)
    torch.testing.assert_close(model(images(2, *size)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_ssf_scales_and_shifts_every_output():
    model, vit = wrapped(td.SSF())
    found = dict(model.adapter.layers)
    names = ["patch_embed-proj", "norm"]
    inside = ["norm1", "attn-qkv", "attn-proj", "norm2", "mlp-fc1", "mlp-fc2"]
    names += [f"blocks-0-{name}" for name in inside]
    assert sorted(found) == sorted(names)
    plain = tiny_vit(depth=1)
    for name, layer in found.items():
        # Scale and shift folded into the weights of a plain model.
        module = plain.get_submodule(name.replace("-", "."))
        shape = (-1,) + (1,) * (module.weight.ndim - 1)
        module.weight.mul_(layer.scale.view(shape))
        module.bias.mul_(layer.scale).add_(layer.shift)
    plain.head.load_state_dict(vit.head.state_dict())
    torch.testing.assert_close(model(images()), plain.eval()(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tt", "tk"])
@torch.no_grad()
def test_fact_updates_every_part_of_the_weight_matrices(kind):
    model, _ = wrapped(td.FacT(rank=3, scale=0.5, kind=kind))
    factors, plain = model.adapter, tiny_vit(depth=1)
    cores = factors.cores
    if kind == "tk":
        cores = torch.einsum("mk,kij->mij", factors.mix, cores)
    left, right = factors.left.weight, factors.right.weight
    updates = [0.5 * right @ core.T @ left for core in cores]
    assert len(updates) == 12
    block = plain.blocks[0]
    for module in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        for column in range(module.in_features // 48):
            for row in range(module.out_features // 48):
                rows, columns = slice(48 * row, 48 * row + 48), slice(48 * column, 48 * column + 48)
                module.weight[rows, columns] += updates.pop(0)
    plain.head.load_state_dict(model.vit.head.state_dict())
    torch.testing.assert_close(model(images()), plain.eval()(images()), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_convpass_is_beside_attention_and_ffn_and_reads_normalised_tokens():
    model, vit = wrapped(td.ConvPass(dim=4, scale=0.5))
    (block,), x = vit.blocks, embedded(vit)

    def bypass(layer, x):
        def quick(x):
            return x * (1.702 * x).sigmoid()

        hidden = quick(layer.down(x)).transpose(1, 2)
        weight, bias = layer.conv.weight, layer.conv.bias
        patches = F.conv2d(hidden[:, :, 1:].reshape(2, 4, 8, 8), weight, bias, padding=1)
        # A class token alone meets the middle of the kernel only.
        first = hidden[:, :, :1].transpose(1, 2) @ weight[:, :, 1, 1].T + bias
        rest = patches.flatten(2).transpose(1, 2)
        return 0.5 * layer.up(quick(torch.cat([first, rest], dim=1)))

    normed = block.norm1(x)
    u = x + block.attn(normed) + bypass(model.adapter.attention[0], normed)
    normed = block.norm2(u)
    expected = u + block.mlp(normed) + bypass(model.adapter.ffn[0], normed)
    torch.testing.assert_close(model(images()), logits(vit, expected), atol=1e-5, rtol=1e-4)


def test_biases_train_and_nothing_else(vit):
    td.wrap(vit, adapt=td.BitFit())
    for name, parameter in vit.named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") or name.startswith("head.")), name


def test_the_last_blocks_train_and_those_before_them_do_not(vit):
    td.wrap(vit, adapt=td.LastBlocks(blocks=1))
    training = {
        name.split(".")[1]
        for name, p in vit.named_parameters()
        if p.requires_grad and name.startswith("blocks.")
    }
    assert training == {"3"}


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "oft", "ia3"])
def test_methods_of_peft_are_put_into_the_backbone(method):
    options = {"feedforward_modules": []} if method == "ia3" else {}
    options |= {"oft_block_size": 16} if method == "oft" else {}
    model = td.wrap(tiny_vit(), adapt=td.PEFT(method=method, options=options))
    assert model.cost().trainable_params > 0
    model(images()).sum().backward()
    trained = [p for p in model.trainable_parameters() if p.grad is not None]
    assert len(trained) > 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.VPT(prompts=0), "prompts must be an integer of at least 1, got 0"),
        (lambda: td.FacT(rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: td.FacT(scale=0), "scale must be a number above 0, got 0"),
        (lambda: td.FacT(kind="cp"), "kind must be one of tt, tk, got 'cp'"),
        (lambda: td.LastBlocks(blocks=0), "blocks must be an integer of at least 1, got 0"),
        (
            lambda: td.wrap(tiny_vit(), adapt=td.LastBlocks(blocks=5)),
            r"blocks must lie in \[1, 4\], got 5",
        ),
        (
            lambda: td.wrap(tiny_vit(), adapt=td.PEFT(method="none")),
            "method must be one of .*lora.*, got 'none'",
        ),
        (
            lambda: td.wrap(tiny_vit(), adapt=td.PEFT(method="loha", options={"q": 1})),
            "options do not fit loha: ",
        ),
        (
            lambda: td.wrap(tiny_vit(), adapt=td.PEFT(method="loha", target_modules=("q",))),
            r"target_modules must name linear layers \(fc1, fc2, head, proj, qkv\), got 'q'",
        ),
        (lambda: td.PEFT(method="loha", target_modules=()), "must name at least one layer"),
        (
            lambda: td.wrap(tiny_vit(), reduce=td.ToMe(r=2), adapt=td.ConvPass()),
            "ConvPass needs the tokens of all patches in every layer, but ToMe takes some away",
        ),
        (
            lambda: td.wrap(tiny_vit(mlp_ratio=2.5), adapt=td.FacT(rank=2)),
            "FacT needs layers whose widths are multiples of 48, but mlp.fc1 is 48 x 120",
        ),
    ],
)
def test_what_makes_no_sense_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
