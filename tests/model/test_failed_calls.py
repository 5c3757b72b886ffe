"""A call that fails half-way leaves models and backbones as they were."""

import copy

import pytest
import torch
from examples import TINY, images, perturbed, tiny_vit

import tokendial as td

BACKBONE = td.Backbone(name="vit_tiny_patch16_224", args=TINY)


class BrokenError(Exception):
    """Stands for whatever can happen in the middle of a call, memory that is full or Ctrl-C."""


def breaking(own, at):
    """`own`, which raises at its call number `at`."""
    calls = iter(range(1, 10**6))

    def called(*args, **kwargs):
        if next(calls) == at:
            raise BrokenError
        return own(*args, **kwargs)

    return called


def state(module):
    """All that a call could have changed."""
    return {
        "modules": {name: id(part) for name, part in module.named_modules()},
        "trains": {name: p.requires_grad for name, p in module.named_parameters()},
        "hooks": {name: [*part._forward_hooks.values()] for name, part in module.named_modules()},
        "attributes": sorted(vars(module)),
        "training": {name: part.training for name, part in module.named_modules()},
    }


@pytest.fixture
def unchanged():
    """Check that a module is what it was when this was called."""
    seen = []

    def note(module):
        seen.append((module, state(module), copy.deepcopy(dict(module.state_dict()))))

    yield note
    for module, before, weights in seen:
        assert state(module) == before
        after = module.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], value) for name, value in weights.items())


NARROW = {"mlp_ratio": 1.5}  # the second layer that a method acts on does not fit it
FAILING = {
    "a degree that is not offered": {"reduce": td.ToMe(r=99), "adapt": td.SSF()},
    "full": {"reduce": td.ToMe(r=99), "adapt": td.FullFineTuning()},
    "half-way": {"adapt": td.FacT(rank=3)},
    "half-way in PEFT": {
        "adapt": td.PEFT(method="c3a", options={"block_size": 16}, target_modules=("qkv", "fc2"))
    },
    "no such layer": {"adapt": td.LoRA(target_modules=("query",))},
    "needs a grid": {"reduce": td.ToMe(r=4), "adapt": td.ConvPass(dim=4)},
    "decoder": {"adapt": td.SSF(), "decode": td.LinearDecoder(num_classes=3)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("methods", FAILING.values(), ids=FAILING)
def test_wrapping(unchanged, methods):
    vit = tiny_vit(**NARROW)
    vit.pos_embed.requires_grad_(False)
    unchanged(vit)
    with pytest.raises(ValueError, match="."):
        td.wrap(vit, **methods)
    td.wrap(copy.deepcopy(vit), adapt=td.LoRA(rank=2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["half-way", "half-way in PEFT", "no such layer"])
def test_adding_an_adapter(unchanged, name):
    model = td.wrap(tiny_vit(**NARROW)).eval()
    model.add_adapter("pets", td.SSF(), num_classes=5)
    model.set_adapter("pets")
    unchanged(model.vit)
    with pytest.raises(ValueError, match="."):
        model.add_adapter("cars", FAILING[name]["adapt"])
    assert model.adapters == ("default", "pets")


def test_taking_turns(unchanged, monkeypatch):
    model = td.wrap(tiny_vit()).eval()
    model.add_adapter("pets", td.SSF())
    model.add_adapter("cars", td.LoRA(rank=2))
    model.set_adapter("pets")
    unchanged(model)
    monkeypatch.setattr(model._adapters.slots["cars"].adapter, "to", breaking(None, 1))
    with pytest.raises(BrokenError):
        model.set_adapter("cars")
    assert model.active_adapter == "pets"


@pytest.mark.parametrize("whole", [True, False])
def test_loading_onto_a_backbone(tmp_path, unchanged, whole):
    model = td.wrap(tiny_vit(), adapt=td.FullFineTuning() if whole else td.SSF(), backbone=BACKBONE)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"degree": 0', '"degree": 7'))
    vit = perturbed(tiny_vit())
    unchanged(vit)
    with pytest.raises(ValueError, match=r"degree must be|trained on another backbone"):
        td.load(tmp_path, vit=vit)
    assert td.wrap(vit).vit is vit


@pytest.mark.parametrize("merge", [True, False])
def test_loading_an_adapter(tmp_path, unchanged, monkeypatch, merge):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), backbone=BACKBONE).eval()
    model.add_adapter("pets", td.LoRA(rank=2))
    model.save_adapter("pets", tmp_path)
    td.Compensator.for_model(model, td.ToCom()).attach(model, merge=merge)
    unchanged(model.vit.blocks[0].mlp)
    logits = model(images())
    monkeypatch.setattr(model, "load_state_dict", breaking(None, 1))
    with pytest.raises(BrokenError):
        model.load_adapter("cars", tmp_path)
    assert (model.adapters, model.active_adapter) == (("default", "pets"), "default")
    assert torch.equal(model(images()), logits)


@pytest.mark.parametrize(
    ("adapt", "last", "name"),
    [
        (td.LoRA(rank=2), lambda model: model.vit.blocks[-1].attn.qkv, "merge"),
        (td.SSF(), lambda model: model.adapter.layers["norm"], "merged_parameters"),
    ],
)
def test_merging(unchanged, monkeypatch, adapt, last, name):
    model = perturbed(td.wrap(tiny_vit(), adapt=adapt))
    unchanged(model)
    with monkeypatch.context() as patch:
        patch.setattr(last(model), name, breaking(None, 1))
        with pytest.raises(BrokenError):
            model.merge_adapters()
    assert not model.adapter.merged
    model.merge_adapters()
    model.unmerge_adapters()


def test_a_method_that_peft_cannot_merge_says_so(unchanged):
    adapt = td.PEFT(method="lily", options={"r": 2, "stride_A": 1, "num_B": 2})
    model = td.wrap(tiny_vit(), adapt=adapt).eval()
    unchanged(model)
    with pytest.raises(ValueError, match="PEFT cannot merge lily"):
        model.merge_adapters()
    assert not model.adapter.merged


def compensated(merge=True):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), backbone=BACKBONE).eval()
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), std=0.3)
    return model, plugin


@pytest.mark.parametrize("merge", [True, False])
def test_attaching(unchanged, monkeypatch, merge):
    model, plugin = compensated()
    unchanged(model)
    owner, name = (plugin, "pair") if merge else (torch.nn.Linear, "register_forward_hook")
    monkeypatch.setattr(owner, name, breaking(getattr(owner, name), 3))
    with pytest.raises(BrokenError):
        plugin.attach(model, merge=merge)
    assert model.compensation is None


@torch.no_grad()
def test_turning(unchanged, monkeypatch):
    model, plugin = compensated()
    plugin.attach(model)
    unchanged(model)
    logits = model(images())
    monkeypatch.setattr(plugin, "pair", breaking(plugin.pair, 3))
    with pytest.raises(BrokenError):
        model.set_degree(2)
    assert model.degree == 4
    assert torch.equal(model(images()), logits)


BATCH = (images(4), torch.arange(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degree": 99}, r"degree must be an integer in \[0, 32\], got 99"),
        ({"degree": 9}, r"degree must be an integer in \[0, 4\]"),
        ({"loader": []}, "loader must give images each time it is gone through"),
        ({"loader": iter([BATCH])}, r"got none at factor 0.3"),
        ({"scales": ()}, "scales must name at least one factor"),
    ],
)
def test_searching_the_factor(unchanged, changes, message):
    model, plugin = compensated()
    plugin.attach(model)
    model.train()
    unchanged(model)
    with pytest.raises(ValueError, match=message):
        plugin.search_scale(
            model, **({"loader": [BATCH], "degree": 2, "scales": (0.2, 0.3)} | changes)
        )
    assert (plugin.scale, model.degree) == (0.5, 4)


def test_searching_the_factor_stopped_half_way(unchanged):
    model, plugin = compensated()
    plugin.attach(model)
    unchanged(model)
    model.forward = breaking(model.forward, 2)
    with pytest.raises(BrokenError):
        plugin.search_scale(model, [BATCH], degree=2)
    del model.forward
    assert (plugin.scale, model.degree) == (0.5, 4)


@pytest.mark.parametrize("at", [1, 3])
def test_calibrating(unchanged, at):
    model = td.wrap(tiny_vit(), reduce=td.DyT()).train()
    model.set_degree(2)
    kept = td.calibrate(model, [images()])
    unchanged(model)
    model.forward = breaking(model.forward, at)
    with pytest.raises(BrokenError):
        td.calibrate(model, [images()])
    del model.forward
    assert model.reducer.calibration is kept
    assert model.degree == 2
