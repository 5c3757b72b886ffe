"""Several adapters by name on one backbone."""

import copy

import pytest
import torch
from examples import ADAPTERS, ON_THE_GRID, TINY, images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td

BACKBONE = td.Backbone(name="vit_tiny_patch16_224", args=TINY)


def shared(**methods):
    return td.wrap(tiny_vit(), backbone=BACKBONE, **methods).eval()


def trained(model, name, seed=3):
    """Change all weights that the adapter trains, as training would."""
    model.set_adapter(name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model, name):
    model.set_adapter(name)
    return model(images())


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_every_method_takes_turns_with_others(tmp_path, name):
    model = shared(reduce=td.FFNMerge(r=8))
    plain, names = model(images()), list(model.vit.state_dict())
    model.add_adapter("pets", ADAPTERS[name], num_classes=5)
    model.add_adapter("cars", ADAPTERS[name])
    assert model.active_adapter == "default"
    assert torch.equal(model(images()), plain)
    trained(model, "pets")
    pets = model(images())
    trained(model, "cars", seed=4)
    cars = model(images())
    assert (pets.shape, cars.shape) == ((2, 5), (2, 7))
    assert torch.equal(logits(model, "default"), plain)
    assert list(model.vit.state_dict()) == names
    assert torch.equal(logits(model, "pets"), pets)
    assert torch.equal(logits(model, "cars"), cars)
    model.save_adapter("pets", tmp_path / "pets")
    assert model.active_adapter == "cars"
    assert torch.equal(td.load(tmp_path / "pets", vit=_with_head(5))(images()), pets)
    other = shared(reduce=td.FFNMerge(r=8))
    other.load_adapter("animals", tmp_path / "pets")
    assert torch.equal(logits(other, "animals"), pets)
    assert torch.equal(logits(other, "default"), plain)


def _with_head(num_classes):
    vit = tiny_vit()
    vit.reset_classifier(num_classes)
    return vit


def test_the_methods_equal_themselves_given_to_wrap():
    model = shared(reduce=td.EViT(layers=(2, 4)))
    for name in ADAPTERS.keys() - ON_THE_GRID:
        wrapped = td.wrap(tiny_vit(), reduce=td.EViT(layers=(2, 4)), adapt=ADAPTERS[name])
        model.add_adapter(name, ADAPTERS[name])
        model.set_adapter(name)
        model.load_state_dict(wrapped.state_dict(), strict=True)
        assert torch.equal(model(images()), wrapped.eval()(images()))


def test_training_one_leaves_the_others_and_the_backbone_alone():
    model = shared(reduce=td.DyT(complete=False))
    model.add_adapter("pets", td.AdaptFormer(dim=4))
    model.add_adapter("cars", td.BitFit())
    before = {name: logits(model, name) for name in model.adapters}
    model.set_adapter("pets")
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    model.train()
    model(images()).square().sum().backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(logits(model, "pets"), before["pets"])
    for name in ("default", "cars"):
        assert torch.equal(logits(model, name), before[name])


def test_one_backbone_lies_in_memory():
    model = shared()
    weights = {p.data_ptr() for p in model.vit.blocks.parameters()}
    for name in ("pets", "cars"):
        model.add_adapter(name, td.LoRA(rank=2))
    model.set_adapter("cars")
    assert weights <= {p.data_ptr() for p in model.vit.blocks.parameters()}
    assert model.cost().trainable_params == 4 * 4 * 48 * 2


def test_what_wrap_froze_and_trained_is_so_again():
    model = shared(adapt=td.AdaptFormer(dim=4))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("pets", td.FullFineTuning())
    trained(model, "pets")
    assert all(p.requires_grad for p in model.vit.parameters())
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


@torch.no_grad()
def test_copies_and_other_arithmetic_take_all_adapters_along():
    model = shared()
    for name in ("lora", "ssf", "full"):
        model.add_adapter(name, ADAPTERS[name])
        trained(model, name)
    before = {name: logits(model, name) for name in model.adapters}
    twin = copy.deepcopy(model)
    trained(twin, "lora", seed=9)
    for name, expected in before.items():
        assert torch.equal(logits(model, name), expected)
        if name != "lora":
            assert torch.equal(logits(twin, name), expected)
    model.set_adapter("default")
    model.double()
    for name, expected in before.items():
        model.set_adapter(name)
        assert torch.allclose(model(images().double()).float(), expected, atol=1e-4)


@torch.no_grad()
def test_merging_one_and_going_on():
    model = shared()
    model.add_adapter("pets", td.LoRA(rank=2))
    model.add_adapter("cars", td.SSF())
    trained(model, "cars")
    trained(model, "pets")
    pets = model(images())
    model.merge_adapters()
    assert torch.allclose(model(images()), pets, atol=1e-5)
    for switch in (lambda: model.set_adapter("cars"), lambda: model.add_adapter("x", td.SSF())):
        with pytest.raises(ValueError, match=r"call unmerge_adapters\(\) first"):
            switch()
    model.unmerge_adapters()
    cars = logits(model, "cars")
    model.merge_adapters()
    assert torch.allclose(model(images()), cars, atol=1e-5)


def test_a_model_of_transformers(tmp_path):
    vit, (height, width) = backbone("hf deit teacher")
    vit.save_pretrained(tmp_path / "vit")
    model = td.wrap(type(vit).from_pretrained(tmp_path / "vit")).eval()
    batch = images(height=height, width=width)
    model.add_adapter("pets", td.AdaptFormer(dim=4), num_classes=3)
    trained(model, "pets")
    with torch.no_grad():
        expected = model(batch)
        model.save_pretrained(tmp_path / "pets")
        assert expected.shape == (2, 3)
        assert torch.equal(td.load(tmp_path / "pets")(batch), expected)


def test_deleting():
    model = shared()
    model.add_adapter("pets", td.SSF())
    model.set_adapter("pets")
    for name in ("pets", "default"):
        with pytest.raises(ValueError, match=f"'{name}' is active or the default"):
            model.delete_adapter(name)
    model.set_adapter("default")
    model.delete_adapter("pets")
    assert model.adapters == ("default",)
    assert not any(module._forward_hooks for module in model.vit.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_adapter("pets", td.SSF()), "name must be one that is not taken"),
        (lambda m: m.add_adapter("", td.SSF()), "name must be one that is not taken, got ''"),
        (lambda m: m.set_adapter("cats"), "name must be one of default, pets, got 'cats'"),
        (lambda m: m.add_adapter("x", td.SSF(), num_classes=0), "num_classes must be at least 1"),
        (lambda m: m.add_adapter("x", td.DARAdapter()), "needs the tokens of all patches"),
        (
            lambda m: m.add_adapter("x", td.LoRA(target_modules=("query",))),
            "target_modules must name linear layers",
        ),
    ],
)
def test_bad_requests_leave_the_model_as_it_was(call, message):
    model = shared(reduce=td.ToMe(r=4))
    model.add_adapter("pets", td.SSF())
    model.set_adapter("pets")
    before, state = logits(model, "pets"), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(model)
    assert (model.active_adapter, list(model.state_dict())) == ("pets", state)
    assert model.adapters == ("default", "pets")
    assert torch.equal(model(images()), before)


def test_a_method_that_trained_the_shared_backbone_is_refused():
    model = shared(adapt=td.BitFit())
    with pytest.raises(ValueError, match="BitFit trains the backbone that all adapters share"):
        model.add_adapter("pets", td.SSF())


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = shared(reduce=td.ToMe(r=4), adapt=td.AdaptFormer(dim=4))
    model.save_pretrained(tmp_path / "pets")
    with pytest.raises(ValueError, match="trained with another reduction"):
        shared(reduce=td.ToMe(r=8)).load_adapter("pets", tmp_path / "pets")
    other = td.wrap(perturbed(tiny_vit()).eval(), reduce=td.ToMe(r=4), backbone=BACKBONE)
    with pytest.raises(ValueError, match="was trained on another backbone"):
        other.load_adapter("pets", tmp_path / "pets")
    shared().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds a model without an adapter"):
        shared().load_adapter("pets", tmp_path / "bare")
    headless = td.wrap(tiny_vit(num_classes=0), backbone=BACKBONE)
    with pytest.raises(ValueError, match="num_classes must be None: this model has no head"):
        headless.add_adapter("pets", td.SSF(), num_classes=3)
    headless.add_adapter("pets", td.SSF())
    assert logits(headless, "pets").shape == (2, 48)


def test_a_whole_file_adds_no_second_backbone(tmp_path):
    random = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    model = td.wrap(tiny_vit(), adapt=td.AdaptFormer(dim=4), backbone=random).eval()
    model.save_pretrained(tmp_path)
    expected = model(images())
    other = shared()
    other.load_adapter("pets", tmp_path)
    assert torch.equal(logits(other, "pets"), expected)
    assert other.cost().trainable_params == model.cost().trainable_params
