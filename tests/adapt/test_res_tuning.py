"""ResTuning: the bypass equals the reference, follows reductions, and keeps no activations."""

import timm
import torch
from examples import golden, images, perturbed, split

import tokendial as td
from tokendial.adapt.res_tuning import ResTuningBypass
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@torch.no_grad()
def test_the_bypass_equals_the_reference():
    meta, tensors = golden("res_tuning_bypass")
    settings = meta["settings"]
    shape = ViTShape(settings["depth"], settings["embed_dim"], 1, 6, has_class_token=True)
    bypass = ResTuningBypass(td.ResTuning(dim=settings["adapter_length"]), shape)
    state = {}
    for name, value in split(tensors, "extra.bypass_blocks.").items():
        block, tuner, _, linear, kind = name.split(".")
        side = {"ln1": "down", "ln2": "up"}[linear]
        state[f"{tuner.removesuffix('_tuner')}.{block}.{side}.{kind}"] = value
    bypass.load_state_dict(state)
    tokens = bypass.before_block(1, Tokens(tensors["input.root"], prefix=1, grid=(2, 3)))
    for layer in range(1, settings["depth"] + 1):
        tokens.x = tensors[f"input.stem.{layer - 1}"]
        tokens = bypass.after_block(layer, tokens)
    torch.testing.assert_close(tokens.x, tensors["output"], atol=1e-5, rtol=1e-5)
    assert tokens.carried == {}


@torch.no_grad()
def test_a_whole_model_by_hand(vit):
    model = td.wrap(vit, adapt=td.ResTuning(dim=5)).eval()
    perturbed(model.adapter, std=0.1)
    x = bypass = vit._pos_embed(vit.patch_embed(images()))
    for n, block in enumerate(vit.blocks):
        x = block(x)
        bypass = model.adapter.lateral[n](x) + model.adapter.vertical[n](bypass)
    torch.testing.assert_close(model(images()), vit.forward_head(vit.norm(bypass)))


@torch.no_grad()
def test_the_bypass_of_merged_tokens_is_their_mean(vit):
    """Adapters that change nothing: the bypass is the sum of all blocks' outputs."""
    model = td.wrap(vit, reduce=td.ToMe(r=[9, 0, 0, 0]), adapt=td.ResTuning(dim=5)).eval()
    for tuner in (*model.adapter.lateral, *model.adapter.vertical):
        torch.nn.init.zeros_(tuner.up.weight)
        torch.nn.init.zeros_(tuner.up.bias)
    steps = list(model.steps(images(), track=True))
    plain = td.wrap(vit, reduce=td.ToMe(r=[9, 0, 0, 0])).eval()
    outs = [step.tokens.x for step in plain.steps(images(), track=True)]
    embedded = model.anatomy.embed(images()).x
    origin = steps[-1].tokens.origin
    means = torch.stack(
        [torch.stack([embedded[i][origin[i] == t].mean(0) for t in range(56)]) for i in range(2)]
    )
    torch.testing.assert_close(steps[-1].tokens.x, means + sum(outs), atol=1e-4, rtol=1e-4)


def test_training_keeps_no_activation_of_the_backbone(vit):
    model = td.wrap(vit, reduce=td.ToMe(r=4), adapt=td.ResTuning(dim=5)).train()
    seen = []
    for block in model.vit.blocks:
        block.mlp.fc1.register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    model(images()).sum().backward()
    assert seen == [False] * 4
    assert all(p.grad is not None for p in model.adapter.parameters())


def test_parameters_and_cost_on_vit_base():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        cost = td.wrap(vit, adapt=td.ResTuning(dim=13)).cost()
    assert cost.trainable_params == 24 * (2 * 768 * 13 + 13 + 768)
    assert round(cost.gmacs, 2) == 17.68
