import copy

import pytest
import timm
import torch
from examples import TINY, images, tiny_vit
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import tokendial as td
from tokendial.backbones import fingerprint, same_backbone

TINY_NAME = "vit_tiny_patch16_224"


def tiny(weights=None, **args):
    return td.Backbone(name=TINY_NAME, weights=weights, args=TINY | args)


def test_a_description_builds_the_same_model_again():
    vit = timm.create_model("deit3_small_patch16_224", img_size=(64, 96), depth=2, num_classes=3)
    again = td.Backbone.of(vit)
    assert again.name == "deit3_small_patch16_224.fb_in1k"
    rebuilt = td.Backbone(name=again.name, weights=None, args=again.args).create()
    shapes = {name: value.shape for name, value in vit.state_dict().items()}
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes


def test_a_model_built_by_its_class_is_wrapped_saved_and_loaded(tmp_path):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.AdaptFormer(dim=4))
    model.save_pretrained(tmp_path)
    again = td.load(tmp_path, vit=copy.deepcopy(vit))
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(ValueError, match="'VisionTransformer' is not a timm model"):
        td.load(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_read_from_a_file(tmp_path, suffix):
    vit, path = tiny_vit(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(vit.state_dict(), path)
    loaded = tiny(str(path)).create().eval()
    torch.testing.assert_close(loaded(images()), vit(images()))


def test_weights_are_read_from_a_fully_trained_model(tmp_path):
    vit = tiny_vit()
    td.wrap(vit, adapt=td.FullFineTuning()).save_pretrained(tmp_path)
    loaded = tiny(str(tmp_path)).create().eval()
    torch.testing.assert_close(loaded(images()), vit(images()))


def test_a_head_of_another_width_is_left_fresh_and_positions_are_resized(tmp_path):
    vit, path = tiny_vit(), tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), path)
    loaded = tiny(str(path), num_classes=3, img_size=48).create()
    assert loaded.pos_embed.shape[1] == 145
    assert torch.equal(loaded.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: td.Backbone(name="vit_tinny", weights=None), "'vit_tinny' is not a timm model"),
        (lambda _: td.Backbone(name="vit_tiny_patch16_225", weights=None), "did you mean"),
        (
            lambda _: tiny(img_size=30),
            "img_size must be divisible by the patch size 4x4, got 30x30",
        ),
        (lambda _: tiny(nonsense=1), "model 'vit_tiny_patch16_224' cannot be built"),
        (lambda _: tiny("/nowhere.pth"), "no such file: /nowhere.pth"),
        (lambda _: tiny("shipped"), "'shipped' exist for scenes_vit only"),
        (lambda path: tiny(str(path / "text.pth")), "text.pth is damaged or not a weight file"),
        (lambda path: tiny(str(path / "deep.pth")), "another backbone: 0 tensors of another shape"),
        (lambda path: tiny(str(path / "wide.pth")), "belongs to another backbone"),
    ],
)
def test_what_cannot_be_built_says_why(tmp_path, make, message):
    (tmp_path / "text.pth").write_text("not a model")
    torch.save(tiny_vit(depth=5).state_dict(), tmp_path / "deep.pth")
    torch.save(tiny_vit(embed_dim=24).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=message):
        make(tmp_path).create()


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        (TINY_NAME, "http://127.0.0.1:9"),
        ("hf-hub:someone/model", "http://127.0.0.1:9"),
        ("transformers.ViTModel", "http://127.0.0.1:9"),
        (TINY_NAME, None),
    ],
)
def test_without_the_hub_pre_trained_weights_are_one_line_after_one_try(monkeypatch, name, hub):
    tries = []
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub is None)
    monkeypatch.setattr("tokendial.hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: tries.append(args))
    problem = f"{hub} does not answer" if hub else "HF_HUB_OFFLINE is set"
    weights = "google/vit" if name.startswith("transformers.") else "pretrained"
    named = weights if name.startswith("transformers.") else name
    with pytest.raises(
        ValueError, match=rf"of {named} are not available: {problem}.*model.weights="
    ):
        td.Backbone(name=name, weights=weights).create()
    assert not tries


@torch.no_grad()
def test_without_the_hub_pre_trained_weights_come_from_its_cache(monkeypatch, tmp_path):
    vit, path = timm.create_model(TINY_NAME).eval(), tmp_path / "model.safetensors"
    save_file(vit.state_dict(), path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("tokendial.hub.try_to_load_from_cache", lambda *args, **kwargs: str(path))
    loaded = td.Backbone(name=TINY_NAME, args={"num_classes": 3}).create()
    assert torch.equal(loaded.norm.bias, vit.norm.bias)
    assert torch.equal(loaded.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is of another class"),
        (lambda: tiny_vit(patch_drop_rate=0.1), "it drops patches at random"),
        (lambda: tiny_vit(global_pool="prr"), "it pools with AttentionPoolPrr"),
        (
            lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1),
            "its blocks are ParallelThingsBlock",
        ),
        (lambda: tiny_vit(attn_layer="diff"), "its attention layers are DiffAttention"),
    ],
)
def test_a_model_that_is_not_supported_says_what_is(make, message):
    with pytest.raises(ValueError, match=f"not supported: .*{message}.* Supported are .*SigLIP"):
        td.wrap(make())


def test_an_image_of_the_wrong_size_says_what_to_do():
    model = td.wrap(tiny_vit())
    with pytest.raises(ValueError, match="images must be 32x32, got 32x48; create the timm model"):
        model(images(1, 32, 48))


def test_a_dynamic_image_has_to_be_divisible_by_the_patch():
    model = td.wrap(tiny_vit(dynamic_img_size=True))
    with pytest.raises(ValueError, match="sides divisible by the patch size 4x4, got 32x33"):
        model(images(1, 32, 33))


def test_fingerprints_survive_half_precision_and_tell_models_apart():
    vit = tiny_vit()
    first = fingerprint(vit)
    assert same_backbone(first, fingerprint(vit.bfloat16().float()))
    torch.manual_seed(5)
    assert not same_backbone(first, fingerprint(timm.create_model(TINY_NAME, **TINY)))
    assert not same_backbone(first, [])
