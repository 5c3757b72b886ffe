"""What users ask of a timm model, a wrapped model answers: at degree 0 with timm's values."""

import pytest
import timm
import torch
from examples import TINY, images, perturbed, tiny_vit
from torch import nn
from zoo import TIMM, backbone

import tokendial as td


def at_degree_0(vit, **methods):
    model = td.wrap(vit, reduce=td.ToMe(r=2), **methods).eval()
    model.set_degree(0)
    return model


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_features_and_head_equal_timms(name):
    vit, size = backbone(name)
    model, pictures = at_degree_0(vit), images(2, *size)
    features = vit.forward_features(pictures)
    torch.testing.assert_close(model.forward_features(pictures), features, atol=1e-5, rtol=1e-5)
    for pre_logits in (False, True):
        ours = model.forward_head(features, pre_logits=pre_logits)
        assert torch.equal(ours, vit.forward_head(features, pre_logits=pre_logits))
    assert (model.num_features, model.embed_dim) == (vit.num_features, vit.embed_dim)
    assert model.num_classes == vit.num_classes
    assert model.no_weight_decay() == {f"vit.{name}" for name in vit.no_weight_decay()}


@pytest.mark.parametrize("name", ["vit", "dinov2 registers", "eva02", "dinov3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 1},
        {"indices": [-1, 0], "norm": True},
        {"indices": [0], "stop_early": True, "return_prefix_tokens": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"},
    ],
)
@torch.no_grad()
def test_intermediates_equal_timms(name, options):
    vit, size = backbone(name)
    pictures = images(2, *size)
    theirs = vit.forward_intermediates(pictures, **options)
    ours = at_degree_0(vit).forward_intermediates(pictures, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 5}, r"indices must be in \[1, 4\] as a number, got 5"),
        ({"indices": [4]}, r"indices must lie in \[-4, 3\], got 4"),
        ({"indices": []}, "indices must name at least one block"),
        ({"output_fmt": "NHWC"}, "output_fmt must be NCHW or NLC, got 'NHWC'"),
    ],
)
def test_intermediates_that_are_not_there(vit, options, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(vit).forward_intermediates(images(), **options)


@pytest.mark.parametrize("pool", ["token", "avg", "max"])
@torch.no_grad()
def test_features_of_merged_tokens_keep_their_shape_and_give_the_logits(pool):
    vit = tiny_vit(global_pool=pool)
    model = td.wrap(vit, reduce=td.ToMe(r=8)).eval()
    features = model.forward_features(images())
    assert features.shape == vit.forward_features(images()).shape
    torch.testing.assert_close(model.forward_head(features), model(images()))


@torch.no_grad()
def test_features_leave_prompts_out(vit):
    for deep in (False, True):
        model = td.wrap(tiny_vit(), adapt=td.VPT(prompts=3, deep=deep)).eval()
        assert model.forward_features(images()).shape == (2, 65, 48)


@torch.no_grad()
def test_a_new_head(tmp_path):
    described = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    model = td.wrap(tiny_vit(), adapt=td.AdaptFormer(dim=4), backbone=described).eval()
    assert model.get_classifier() is model.vit.head
    model.reset_classifier(9, "avg")
    assert (model.num_classes, model.vit.global_pool) == (9, "avg")
    assert model.get_classifier().weight.requires_grad
    model.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images()), model(images()))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images()).shape == (2, 48)


def test_heads_that_cannot_be_had():
    clips = td.wrap(td.video_vit(tiny_vit(global_pool="", num_classes=0), frames=2, num_classes=5))
    with pytest.raises(ValueError, match="the head of a video model cannot be reset"):
        clips.reset_classifier(3)
    dense = td.wrap(tiny_vit(num_classes=0), decode=td.LinearDecoder(num_classes=3))
    assert dense.get_classifier() is dense.decoder
    with pytest.raises(ValueError, match="reset_classifier is for heads, but this model has a dec"):
        dense.reset_classifier(3)
    hugging, _ = backbone("hf vit")
    with pytest.raises(ValueError, match="forward_head needs a model of timm, vit is a ViTFor"):
        td.wrap(hugging).forward_head(torch.zeros(1, 5, 48))


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        tiny_vit(), peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=[])
    )
    for parameter in tuned.get_base_model().head.parameters():
        parameter.requires_grad_(True)  # heads always train here
    tuned.print_trainable_parameters()
    expected = capsys.readouterr().out
    td.wrap(tiny_vit(), adapt=td.LoRA(rank=2, target_modules=("qkv",))).print_trainable_parameters()
    assert capsys.readouterr().out == expected


def test_activations_are_recomputed_on_demand():
    model = td.wrap(tiny_vit(), adapt=td.AdaptFormer(dim=4)).train()
    passes = []
    model.vit.blocks[0].mlp.register_forward_hook(lambda *_: passes.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        passes.clear()
        model(images()).sum().backward()
        assert len(passes) == expected
    model.set_grad_checkpointing()
    assert model.checkpoint_activations


def test_representation_starts_with_methods_and_degree(vit):
    model = td.wrap(vit, reduce=td.ToMe(r=4), adapt=td.SSF())
    lines = repr(model).splitlines()
    assert lines[:4] == [
        "DialViT(",
        f"  reduce={td.ToMe(r=4)},",
        f"  adapt={td.SSF()},",
        "  degree=4 of 0 to 32",
    ]
    assert lines[4].startswith("  (vit): VisionTransformer(")
    assert repr(td.wrap(tiny_vit())).splitlines()[1] == "  degree=0 of 0 to 0"


# Unwrapping.


@pytest.mark.parametrize(
    "adapt",
    [None, td.LoRA(rank=2), td.SSF(), td.FacT(rank=2), td.BitFit(), td.FullFineTuning()],
    ids=lambda adapt: type(adapt).__name__,
)
@pytest.mark.parametrize("named", [False, True])
@torch.no_grad()
def test_an_unwrapped_model_is_an_ordinary_one_with_the_logits_of_degree_0(adapt, named):
    vit = tiny_vit()
    vit.pos_embed.requires_grad_(False)
    kinds = {name: type(module) for name, module in vit.named_modules()}
    if named and adapt:
        model = at_degree_0(vit)
        model.add_adapter("pets", adapt, num_classes=5)
        model.set_adapter("pets")
        model.set_degree(0)
    else:
        model = at_degree_0(vit, adapt=adapt)
    for parameter in model.trainable_parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    logits = model(images())
    bare = model.unwrap()
    assert bare is vit
    torch.testing.assert_close(vit(images()), logits, atol=1e-4, rtol=1e-4)
    assert {name: type(module) for name, module in vit.named_modules()} == kinds
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed"}
    assert not any(module._forward_hooks for module in vit.modules())
    with pytest.raises(AttributeError, match="anatomy"):
        model(images())
    assert td.wrap(vit, adapt=td.LoRA(rank=2)).vit is vit


@pytest.mark.parametrize("adapt", [td.LoRA(rank=2), td.SSF(), td.DenseAdapter(dim=4)])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_unwrapping_without_the_adapter_gives_the_backbone_as_it_was(adapt, merged):
    vit = tiny_vit()
    logits = vit(images())
    model = at_degree_0(vit, adapt=adapt)
    perturbed(model.adapter)
    for module in vit.modules():  # the layers that PEFT put in
        if hasattr(module, "lora_B"):
            perturbed(module.lora_B)
    if merged and not isinstance(adapt, td.DenseAdapter):
        model.merge_adapters()
    assert torch.equal(model.unwrap(merge=False)(images()), logits)


@torch.no_grad()
def test_what_cannot_be_unwrapped_stays_as_it_is():
    dense = at_degree_0(tiny_vit(), adapt=td.DenseAdapter(dim=4))
    perturbed(dense.adapter)
    decoding = td.wrap(tiny_vit(num_classes=0), decode=td.LinearDecoder(num_classes=3)).eval()
    described = td.Backbone(name="vit_tiny_patch16_224", args=TINY)
    compensated = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), backbone=described).eval()
    td.Compensator.for_model(compensated, td.ToCom()).attach(compensated)
    for model, message in (
        (dense, r"DenseAdapters cannot be merged .*; unwrap\(merge=False\) gives the backbone"),
        (decoding, r"cannot hold the decoder: use unwrap\(merge=False\)"),
        (compensated, "a compensator is attached: detach it first"),
    ):
        logits = model(images())
        with pytest.raises(ValueError, match=message):
            model.unwrap()
        assert torch.equal(model(images()), logits)


def test_an_unwrapped_head_is_that_of_the_active_adapter():
    model = td.wrap(tiny_vit())
    model.add_adapter("pets", td.LoRA(rank=2), num_classes=5)
    model.set_adapter("pets")
    head = model.vit.head
    assert model.unwrap().head is head
    assert isinstance(head, nn.Linear)


def test_timm_reads_mean_and_deviation(vit):
    expected = timm.data.resolve_model_data_config(vit)
    assert timm.data.resolve_model_data_config(td.wrap(vit)) == expected
