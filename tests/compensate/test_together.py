"""A compensator and all else that touches the weights of queries and values, in any order."""

import copy

import pytest
import torch
from examples import TINY, images, perturbed, tiny_vit

import tokendial as td

BACKBONE = td.Backbone(name="vit_tiny_patch16_224", args=TINY)
ADAPTERS = {
    "full": td.FullFineTuning(),
    "adaptformer": td.AdaptFormer(dim=4),
    "ssf": td.SSF(),
    "fact": td.FacT(rank=3),
    "lora": td.LoRA(rank=2),
    "loha": td.PEFT(method="loha", options={"r": 2}),
    "ia3": td.PEFT(method="ia3", options={"feedforward_modules": []}),
    "oft": td.PEFT(method="oft", options={"r": 3, "oft_block_size": 0}),
    "dora": td.PEFT(method="lora", options={"r": 2, "use_dora": True}),
}
MERGEABLE = ADAPTERS.keys() - {"full", "adaptformer"}
DEGREE, SOURCE = 6, 1
pytestmark = pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")


def plain_model():
    return td.wrap(tiny_vit(), reduce=td.ToMe(r=8), backbone=BACKBONE).eval()


def tuned(name):
    """Two adapters that were trained, of which "tuned" acts, and a compensator."""
    model = plain_model()
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), std=0.3)
    for own, adapt in (("other", td.SSF()), ("tuned", ADAPTERS[name])):
        model.add_adapter(own, adapt)
        model.set_adapter(own)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.set_degree(DEGREE)
    return model, plugin


def by_definition(model, plugin, name):
    """Equation 3 of ToCom on the weights that the adapter has become a part of."""
    model = copy.deepcopy(model)
    if name in MERGEABLE:
        model.merge_adapters()
    for layer, block in enumerate(model.vit.blocks, start=1):
        qkv = block.attn.qkv
        weight = getattr(qkv, "base_layer", qkv).weight
        for part, first in (("query", 0), ("value", 96)):
            down, up = plugin.pair(part, layer, SOURCE, DEGREE)
            weight[first : first + 48] += up @ down
    return model(images())


def merge(model, plugin, merge):
    model.merge_adapters()


def merge_and_back(model, plugin, merge):
    model.merge_adapters()
    model.unmerge_adapters()


def merge_without_compensator(model, plugin, merge):
    plugin.detach(model)
    model.merge_adapters()
    plugin.attach(model, source=SOURCE, merge=merge)


def attach_the_other_way(model, plugin, merge):
    plugin.detach(model)
    plugin.attach(model, source=SOURCE, merge=not merge)


def turn(model, plugin, merge):
    for degree in (0, 8, 3, DEGREE):
        model.set_degree(degree)


def turn_by_the_attribute(model, plugin, merge):
    model.degree = 0
    model.degree = DEGREE


def take_turns(model, plugin, merge):
    for name in ("default", "other", "tuned"):
        model.set_adapter(name)


def add_and_delete(model, plugin, merge):
    model.add_adapter("late", td.SSF())
    model.delete_adapter("late")


def change_arithmetic(model, plugin, merge):
    model.double()
    model.set_degree(0)
    model.float()
    model.set_degree(DEGREE)


OPERATIONS = (turn, turn_by_the_attribute, take_turns, add_and_delete, attach_the_other_way)
MERGES = (merge, merge_and_back, merge_without_compensator)


@pytest.mark.parametrize("merge", [True, False], ids=["in weights", "beside"])
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_every_order_gives_the_difference_added_to_the_tuned_model(tmp_path, name, merge):
    model, plugin = tuned(name)
    own, expected = model(images()), by_definition(model, plugin, name)
    assert not torch.allclose(own, expected, atol=0.05)
    plugin.attach(model, source=SOURCE, merge=merge)
    operations = OPERATIONS + (MERGES if name in MERGEABLE else ())
    for operation in (*operations, change_arithmetic):
        changed = copy.deepcopy(model)
        plugin_of_copy = changed.compensation.compensator
        operation(changed, plugin_of_copy, merge)
        assert torch.allclose(changed(images()), expected, atol=2e-5), operation
    model.save_adapter("tuned", tmp_path)
    torch.testing.assert_close(model(images()), expected, atol=2e-5, rtol=0)
    loaded = plain_model()
    loaded.set_degree(DEGREE)
    plugin.attach(loaded, source=SOURCE, merge=merge)
    loaded.load_adapter("tuned", tmp_path)
    loaded.set_adapter("tuned")
    torch.testing.assert_close(loaded(images()), expected, atol=2e-5, rtol=0)
    for one in (model, loaded):
        plugin.detach(one)
        assert torch.equal(one(images()), own)


@torch.no_grad()
def test_merging_frees_of_the_cost_of_a_compensator_beside_ssf():
    model, plugin = tuned("ssf")
    without = model.cost().macs
    plugin.attach(model)
    assert model.cost().macs > without
    model.merge_adapters()
    assert model.cost().macs == without


def test_weights_are_not_loaded_over_kept_ones():
    model, plugin = tuned("ssf")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapters()
    with pytest.raises(ValueError, match=r"merged: call unmerge_adapters\(\) first"):
        model.load_state_dict(state)
    plugin.attach(model)
    model.unmerge_adapters()
    model.load_state_dict(state)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="a compensator is in the weights: detach it"):
        torch.nn.ModuleList([model]).load_state_dict({}, strict=False)
