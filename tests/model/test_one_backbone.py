"""A backbone and the wrapped models that run it: shared, replaced, replicated."""

import copy

import pytest
import timm
import torch
from examples import TINY, images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td


@pytest.mark.parametrize(
    "adapt",
    [td.LoRA(rank=2), td.SSF(), td.AdaptFormer(dim=4), td.FullFineTuning()],
    ids=lambda a: a.__class__,
)
def test_an_adapter_never_changes_another_model(adapt):
    vit = tiny_vit()
    first = td.wrap(vit, reduce=td.ToMe(r=4), adapt=adapt).eval()
    logits, trained = first(images()), [p.requires_grad for p in vit.parameters()]
    with pytest.raises(ValueError, match=r"holds the|another wrapped model has this backbone"):
        td.wrap(vit, adapt=td.LoRA(rank=4))
    assert torch.equal(first(images()), logits)
    assert [p.requires_grad for p in vit.parameters()] == trained
    td.wrap(tiny_vit(), adapt=td.LoRA(rank=4))


def test_models_without_adapters_share_a_backbone_until_one_gets_an_adapter():
    vit = tiny_vit()
    slow, fast = td.wrap(vit), td.wrap(vit, reduce=td.ToMe(r=8))
    for change in (
        lambda: td.wrap(vit, adapt=td.SSF()),
        lambda: slow.add_adapter("pets", td.SSF()),
    ):
        with pytest.raises(ValueError, match="another wrapped model has this backbone"):
            change()
    assert all(p.requires_grad for p in vit.parameters())
    del fast
    slow.add_adapter("pets", td.SSF())
    with pytest.raises(ValueError, match="another wrapped model has this backbone"):
        td.wrap(vit)
    slow.set_adapter("pets")
    with pytest.raises(ValueError, match="holds the SSF of a wrapped model"):
        td.wrap(copy.deepcopy(vit))


def test_a_backbone_that_was_trained_is_wrapped_again_when_its_model_is_gone():
    vit = tiny_vit()
    td.wrap(vit, adapt=td.FullFineTuning())
    assert td.wrap(vit, adapt=td.AdaptFormer(dim=4)).vit is vit


# Replaced.


@pytest.mark.parametrize("kind", ["vit", "dinov3", "hf vit"])
@torch.no_grad()
def test_a_model_runs_the_backbone_that_it_was_given_last(kind):
    vit, size = backbone(kind)
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.AdaptFormer(dim=4)).eval()
    perturbed(model.adapter)
    other = perturbed(copy.deepcopy(vit), std=0.1)
    other.requires_grad_(True)
    model.vit = other
    expected = td.wrap(other, reduce=td.ToMe(r=2)).eval()
    expected.adapter = model.adapter
    assert torch.equal(model(images(2, *size)), expected(images(2, *size)))
    trained = {name for name, p in model.vit.named_parameters() if p.requires_grad}
    assert trained == {name for name in trained if "head" in name or "classifier" in name}
    assert model.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("adapt", "other", "message"),
    [
        (None, lambda: tiny_vit(depth=3), "vit must be a model of the same kind and shape"),
        (None, lambda: timm.create_model("resnet18"), "ResNet is of another class"),
        (td.SSF(), tiny_vit, "an adapter has put layers into it"),
        (td.LoRA(rank=2), tiny_vit, "an adapter has put layers into it"),
    ],
)
@torch.no_grad()
def test_a_backbone_that_cannot_stand_in_is_refused(adapt, other, message):
    model = td.wrap(tiny_vit(), adapt=adapt).eval()
    vit, logits = model.vit, model(images())
    with pytest.raises(ValueError, match=message):
        model.vit = other()
    assert model.vit is vit
    assert torch.equal(model(images()), logits)


def replicas(network, change):
    """What `torch.nn.parallel.replicate` makes for one device; `change` stands for the transfer."""
    modules = list(network.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for key, child in module._modules.items():
            if child is None:
                copies[module]._modules[key] = None
            else:
                setattr(copies[module], key, copies[child])
        for key, parameter in module._parameters.items():
            setattr(copies[module], key, None if parameter is None else change(parameter))
        for key, buffer in module._buffers.items():
            setattr(copies[module], key, None if buffer is None else change(buffer))
    return copies[network]


@pytest.mark.parametrize("adapt", [None, td.AdaptFormer(dim=4), td.LoRA(rank=2), td.VPT(prompts=2)])
@pytest.mark.parametrize("kind", ["vit", "dinov3", "hf vit"])
@torch.no_grad()
def test_replicas_of_data_parallel_compute_with_their_own_weights(kind, adapt):
    vit, size = backbone(kind)
    if isinstance(adapt, td.LoRA) and kind == "hf vit":
        adapt = td.LoRA(rank=2, target_modules=("q_proj", "v_proj"))
    model = perturbed(td.wrap(vit, reduce=td.ToMe(r=2), adapt=adapt))
    moved = copy.deepcopy(model).double()
    replica = replicas(model, lambda tensor: tensor.double() + 0.01 * (tensor != 0))
    for tensor in (*moved.parameters(), *moved.buffers()):
        tensor += 0.01 * (tensor != 0)
    pictures = images(2, *size)
    torch.testing.assert_close(replica(pictures.double()), moved(pictures.double()))
    assert model(pictures).dtype == torch.float32
    assert model.anatomy.vit is vit


@torch.no_grad()
def test_hooks_that_cannot_be_replicated_are_refused_and_merged_ones_are_not():
    model = perturbed(td.wrap(tiny_vit(), adapt=td.SSF()))
    with pytest.raises(ValueError, match="ScalesAndShifts acts by hooks, which .*DataParallel"):
        replicas(model, torch.clone)
    model.merge_adapters()
    assert torch.equal(replicas(model, torch.clone)(images()), model(images()))


# What the backbone says of itself.


@pytest.mark.parametrize("name", ["vit", "clip", "dinov3", "siglip"])
def test_timm_finds_the_preprocessing_of_the_backbone(name):
    vit, _ = backbone(name)
    expected = timm.data.resolve_model_data_config(vit)
    model = td.wrap(vit, reduce=td.ToMe(r=2))
    assert timm.data.resolve_model_data_config(model) == expected
    assert expected["mean"] == model.anatomy.statistics[0]
    assert model.pretrained_cfg is model.default_cfg is vit.pretrained_cfg


def test_a_backbone_that_knows_no_preprocessing_makes_none_up():
    model = td.wrap(backbone("hf vit")[0])
    assert not hasattr(model, "pretrained_cfg")
    assert not hasattr(model, "default_cfg")


# The degree is an attribute, too.


@pytest.mark.parametrize("degree", [-1, 33, 1.5, True, None, "4"])
def test_a_degree_that_is_not_offered_is_refused_wherever_it_is_set(degree):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4))
    for turn in (model.set_degree, lambda d: setattr(model, "degree", d)):
        with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got"):
            turn(degree)
    assert model.degree == 4


# A head that was replaced after wrapping.


def rewired(vit):
    vit.head = perturbed(torch.nn.Linear(48, 9))


HEADS = {
    "other classes": lambda vit: vit.reset_classifier(9),
    "other pooling": lambda vit: vit.reset_classifier(5, "avg"),
    "no head": lambda vit: vit.reset_classifier(0),
    "by hand": rewired,
}


@pytest.mark.parametrize("adapt", [None, td.AdaptFormer(dim=4), td.FullFineTuning()])
@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_a_model_with_another_head_is_saved_and_loaded(tmp_path, change, adapt):
    described = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), adapt=adapt, backbone=described).eval()
    change(model.vit)
    perturbed(model.vit.head)
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.num_classes == model.num_classes


@torch.no_grad()
def test_the_other_head_belongs_to_the_adapter_that_acted(tmp_path):
    described = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    model = td.wrap(tiny_vit(), backbone=described).eval()
    model.add_adapter("pets", td.SSF(), num_classes=5)
    model.vit.reset_classifier(9)
    model.add_adapter("cars", td.SSF())
    widths = {}
    for name in model.adapters:
        model.set_adapter(name)
        widths[name] = model(images()).shape[1]
        model.save_pretrained(tmp_path / name)
        assert torch.equal(td.load(tmp_path / name)(images()), model(images()))
    assert widths == {"default": 9, "pets": 5, "cars": 9}


@torch.no_grad()
def test_a_transformers_model_with_another_head_is_saved_and_loaded(tmp_path):
    vit, size = backbone("hf vit")
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.AdaptFormer(dim=4)).eval()
    vit.classifier = torch.nn.Linear(48, 9)
    model.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images(2, *size)), model(images(2, *size)))


def test_a_head_beside_a_decoder_is_not_saved(tmp_path):
    model = td.wrap(tiny_vit(num_classes=0), decode=td.LinearDecoder(num_classes=3))
    model.vit.reset_classifier(9)
    with pytest.raises(ValueError, match=r"a decoder needs a backbone without .* 9 classes"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copied_model_can_be_unwrapped_without_the_original():
    model = td.wrap(tiny_vit(), adapt=td.LoRA(rank=2)).eval()
    copied = copy.deepcopy(model)
    logits = model(images())
    torch.testing.assert_close(copied.unwrap()(images()), logits)
    assert torch.equal(model(images()), logits)


def test_a_replaced_backbone_is_free_after_its_model_is_unwrapped():
    first = tiny_vit()
    model = td.wrap(first)
    model.vit = tiny_vit()
    model.unwrap()
    assert td.wrap(first, adapt=td.LoRA(rank=2)).vit is first
