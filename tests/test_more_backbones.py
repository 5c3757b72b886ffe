"""What the kinds of ViT do that differ from timm's: own poolings, positions, orders of tokens.

That each kind equals the model itself at degree 0, runs with every method, and restores its feature
maps is tested in model/test_dial_vit.py and test_every_method_on_every_backbone.py.
"""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
import torchvision
import transformers
from examples import images, perturbed
from zoo import (
    EVERY,
    HUGGING_FACE,
    TORCHVISION,
    backbone,
    last_features,
    own_output,
    run_transformers,
)

import tokendial as td
from tokendial.backbones.siglip import pool_by_attention

NEW = [
    name
    for name in EVERY
    if name.startswith(("naflex", "torchvision"))
    or (
        name in HUGGING_FACE
        and not HUGGING_FACE[name][0].startswith(("ViTFor", "ViTModel", "DeiT", "CLIP"))
    )
]
CLASS_TOKEN = {
    "naflex vit", "naflex dinov3", "naflex rope mixed", "hf mae", "hf owlvit", "hf owlv2",
    "hf yolos", "hf yolos mid positions", *TORCHVISION,
    *(name for name in HUGGING_FACE if "dino" in name),
}  # fmt: skip
HEADLESS = [
    name
    for name in NEW
    if name in HUGGING_FACE and "classifier" not in name and "dinov3 backbone" not in name
]


def of_class(cls, **settings):
    """A model of transformers with random weights and one block."""
    sizes = {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    model = getattr(transformers, cls)
    return perturbed(model(model.config_class(**(sizes | settings))))


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", [name for name in HEADLESS if "For" not in HUGGING_FACE[name][0]])
@torch.no_grad()
def test_features_of_all_tokens_are_the_models_own(name, square):
    """Catches: tokens in another order; a final norm that is left out."""
    vit, size = backbone(name, square=square)
    pictures = images(2, *size)
    model = td.wrap(vit)
    own = last_features(vit, pictures)
    if "owl" in name:  # the model applies its last norm to the class token only
        own = vit.vision_model.post_layernorm(own)
    if "yolos" in name:
        own = torch.cat([own[:, :1], own[:, -5:], own[:, 1:-5]], dim=1)
    torch.testing.assert_close(model.forward_features(pictures), own, atol=1e-5, rtol=0)
    rows, columns = size[0] // 16, size[1] // 16
    patches = own[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    torch.testing.assert_close(model.feature_map(pictures), patches, atol=1e-5, rtol=0)


@torch.no_grad()
def test_feature_maps_are_those_of_a_backbone_of_transformers():
    vit = of_class("Dinov2Backbone", out_features=["stage1"])
    torch.testing.assert_close(
        td.wrap(vit).feature_map(images(2, 64, 96)), vit(images(2, 64, 96)).feature_maps[0]
    )


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_the_numbers_of_tokens_are_those_that_the_method_promises(name):
    """Catches: prefix tokens that are counted wrongly, or merged."""
    vit, size = backbone(name)
    count = td.wrap(vit).anatomy.shape.num_prefix_tokens + 16
    merged = td.wrap(vit, reduce=td.ToMe(r=3)).eval()
    assert [step.tokens.x.shape[1] for step in merged.steps(images(2, *size))] == [
        count - 3,
        count - 6,
    ]
    assert merged.cost().tokens_per_layer == (count - 3, count - 6)
    ffn = td.wrap(vit, reduce=td.FFNMerge(r=3)).eval()
    assert {step.tokens.x.shape[1] for step in ffn.steps(images(2, *size))} == {count}
    if name in CLASS_TOKEN:
        dropped = td.wrap(vit, reduce=td.EViT(keep_rate=0.5, layers=(1,))).eval()
        *_, last = dropped.steps(images(2, *size))
        assert last.tokens.x.shape[1] == count - 16 + 8 + 1  # half of the patches, a fused token
    else:
        with pytest.raises(ValueError, match="class token"):
            td.wrap(vit, reduce=td.EViT(keep_rate=0.5, layers=(1,)))


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_a_model_with_random_weights_is_saved_whole_and_built_again(name, tmp_path):
    """Catches: arguments that a description leaves out."""
    vit, size = backbone(name)
    described = dataclasses.replace(td.Backbone.of(vit), weights=None)
    model = td.wrap(vit, reduce=td.ToMe(r=2), backbone=described).eval()
    model.save_pretrained(tmp_path)
    again = td.load(tmp_path)
    assert again.backbone.name == described.name
    assert torch.equal(again(images(2, *size)), model(images(2, *size)))


def called_parts(vit, run):
    """How often a call runs each part of the blocks that has no parts of its own."""
    calls = Counter()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for block in td.wrap(vit).anatomy.blocks
        for name, part in block.named_modules()
        if not list(part.children())
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_every_part_of_a_block_runs_as_often_as_in_the_model_itself(name):
    """Catches: a dropout or LayerScale that is left out, which at evaluation changes nothing."""
    vit, size = backbone(name)
    pictures = images(1, *size)
    model, run_itself = (
        td.wrap(vit),
        run_transformers if name in HUGGING_FACE else type(vit).forward,
    )
    own = called_parts(vit, lambda: run_itself(vit, pictures))
    ours = called_parts(vit, lambda: model(pictures))
    # PyTorch's attention layer reads the weights of its projection; here it is called.
    ours.pop("self_attention.out_proj", None)
    assert own
    assert ours == own


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_half_precision_runs(name):
    """Catches: positions or sizes that stay in single precision."""
    vit, size = backbone(name, square=False)
    model = td.wrap(vit.bfloat16(), reduce=td.ToMe(r=3)).eval()
    logits = model(images(2, *size).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NEW)
def test_gradients_reach_the_adapter_and_lora(name):
    """Catches: a branch that does not call the model's own layer."""
    vit, size = backbone(name)
    block = td.wrap(vit).anatomy.blocks[0]
    linear = {part.rsplit(".", 1)[-1] for part, _ in block.named_modules()}
    target = next(t for t in ("qkv", "v_proj", "value", "out_proj") if t in linear)
    for adapt in (td.AdaptFormer(dim=4), td.LoRA(rank=2, target_modules=(target,))):
        model = perturbed(td.wrap(backbone(name)[0], reduce=td.ToMe(r=2), adapt=adapt), std=0.02)
        model(images(2, *size)).square().sum().backward()
        trained = list(model.trainable_parameters())
        assert trained
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", ["hf siglip", "torchvision"])
@torch.no_grad()
def test_lora_acts_where_pytorchs_attention_layer_reads_weights_only(name):
    """Catches: a LoRA on the output projection that has no effect."""
    vit, size = backbone(name)
    model = td.wrap(vit, adapt=td.LoRA(rank=2, target_modules=("out_proj",))).eval()
    layers = [part for part in model.vit.modules() if hasattr(part, "lora_B")]
    assert layers
    for part in layers:
        before = model(images(1, *size))
        perturbed(part.lora_B, std=0.5)
        assert not torch.allclose(model(images(1, *size)), before, atol=1e-4)


@torch.no_grad()
def test_attention_pooling_weighs_a_merged_token_by_its_size():
    """Catches: sizes that are ignored, or added without the logarithm."""
    head = of_class("SiglipVisionModel").head
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([x, x[:, 3:], x[:, 4:]], dim=1)
    sizes = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]).expand(2, -1)
    torch.testing.assert_close(pool_by_attention(head, x, sizes), head(twice), atol=1e-5, rtol=0)


@torch.no_grad()
def test_mae_is_not_masked_whatever_its_ratio():
    """Catches: an embedding that drops patches at random."""
    vit = of_class("ViTMAEModel", mask_ratio=0.75)
    model = td.wrap(vit)
    assert model.feature_map(images(1, 64, 96)).shape == (1, 48, 4, 6)
    pictures = images(2, 64, 64)
    unmasked = copy.deepcopy(vit)
    unmasked.config.mask_ratio = 0.0
    torch.testing.assert_close(model(pictures), own_output(unmasked)(pictures), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_configured_size_may_leave_a_rest():
    """SigLIP so400m has patches of 14 on 384: the model leaves 6 pixels out."""
    vit = of_class("SiglipVisionModel", image_size=70)
    pictures = images(2, 70, 70)
    model = td.wrap(vit)
    torch.testing.assert_close(model(pictures), vit(pictures).pooler_output, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="sides divisible by the patch size 16x16, got 70x71"):
        model(images(1, 70, 71))


@torch.no_grad()
def test_positions_between_blocks_follow_the_tokens_of_yolos():
    """Catches: positions that are added to other tokens after a reduction."""
    vit, size = backbone("hf yolos mid positions")
    model = td.wrap(vit, reduce=td.ToMe(r=4)).eval()
    first, second = (step.tokens for step in model.steps(images(2, *size)))
    entered = model.anatomy.enter_block(2, first)
    added = entered.x - first.x
    own = vit.encoder.interpolation(size)[0, 0]
    table = torch.cat([own[:1], own[-5:], own[1:-5]])
    torch.testing.assert_close(added[:, :6], table[:6].expand(2, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(added[:, 6:], table[6:][first.position], atol=1e-6, rtol=0)
    assert first.position.shape == (2, 12)
    assert second.x.shape[1] == 6 + 8


@torch.no_grad()
def test_prompts_have_no_position_between_blocks():
    vit, size = backbone("hf yolos mid positions")
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.VPT(prompts=3, deep=False)).eval()
    assert model(images(2, *size)).isfinite().all()


@pytest.mark.parametrize("name", ["naflex factorized", "hf siglip2"])
@torch.no_grad()
def test_prompts_are_drawn_for_a_patch_embedding_without_a_convolution(name):
    vit, _ = backbone(name)
    embedding = vit.embeds.proj if name.startswith("naflex") else vit.embeddings.patch_embedding
    adapter = td.wrap(vit, adapt=td.VPT(prompts=8)).adapter
    bound = (6 / (embedding.in_features + embedding.out_features)) ** 0.5
    largest = adapter.prompts.abs().max().item()
    assert 0.9 * bound < largest <= bound


@pytest.mark.parametrize("name", ["naflex", "naflex dinov3", "hf siglip2"])
@torch.no_grad()
def test_any_image_size_runs_where_positions_are_resized(name):
    vit, _ = backbone(name)
    pictures = images(2, 32, 112)
    torch.testing.assert_close(td.wrap(vit)(pictures), own_output(vit)(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: of_class("VitPoseBackbone", num_experts=2, part_features=12),
            r"its layers are mixtures of experts \(num_experts\)",
        ),
        (
            lambda: transformers.IJepaModel(of_class("IJepaModel").config, add_pooling_layer=True),
            "its pooler reads the first patch",
        ),
        (
            lambda: transformers.SiglipModel(
                transformers.SiglipConfig(
                    text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1}
                )
            ),
            "SiglipModel is of another class",
        ),
        (lambda: other_release(), "this ViTMAEModel is of another release of transformers"),
        (lambda: with_linear_heads(), "its heads are Linear: put a new layer at heads.head"),
        (lambda: torchvision.models.swin_t(), "SwinTransformer is of another class"),
        (
            lambda: torchvision.models.VisionTransformer(
                32, 8, 1, 3, 48, 96, norm_layer=torch.nn.LayerNorm
            ),
            r"its norms are not torchvision's own \(norm_layer\)",
        ),
    ],
)
def test_a_variant_that_would_run_wrongly_is_refused(make, message):
    with pytest.raises(ValueError, match=f"not supported: {message}.* Supported are .*NaFlexVit"):
        td.wrap(make())


def other_release():
    vit = of_class("ViTMAEModel")
    del vit.layers[0].attention.o_proj
    return vit


def with_linear_heads():
    vit, _ = backbone("torchvision")
    vit.heads = torch.nn.Linear(48, 5)
    return vit


@pytest.mark.parametrize(
    ("name", "pictures", "message"),
    [
        ("naflex", {"patches": torch.zeros(1, 4, 768)}, r"batches of patches .* not supported"),
        ("naflex", torch.zeros(1, 4, 768), r"must be a tensor \[batch, 3, height, width\]"),
        ("naflex", torch.zeros(1, 3, 64, 70), "divisible by the patch size 16x16, got 64x70"),
        ("torchvision", torch.zeros(1, 3, 64, 96), "images must be 64x64, got 64x96; create"),
        ("hf vitpose", torch.zeros(1, 3, 64, 96), "64x96: VitPoseBackbone does not resize"),
    ],
)
def test_images_that_do_not_fit_are_one_line(name, pictures, message):
    model = td.wrap(backbone(name)[0])
    with pytest.raises(ValueError, match=message) as caught:
        model(pictures)
    assert "\n" not in str(caught.value)


def test_lora_says_which_layers_of_torchvisions_model_it_can_act_on():
    with pytest.raises(ValueError, match=r"linear layers \(0, 3, head, out_proj\), got 'qkv'"):
        td.wrap(backbone("torchvision")[0], adapt=td.LoRA())


@torch.no_grad()
def test_a_model_of_torchvision_is_built_by_its_builder_and_a_file(tmp_path):
    args = {"image_size": 32, "num_classes": 0, "num_heads": 3}
    vit, file = backbone("torchvision")[0], tmp_path / "weights.pth"
    torch.save(vit.state_dict(), file)
    described = td.Backbone.of(vit)
    assert described.name == "torchvision.VisionTransformer"
    again = dataclasses.replace(described, weights=str(file)).create().eval()
    assert torch.equal(again(images(1, 64, 64)), vit(images(1, 64, 64)))
    with pytest.raises(ValueError, match="torchvision.vit_b_16' cannot be built: .*num_heads"):
        td.Backbone(name="torchvision.vit_b_16", weights=None, args=args).create()
    with pytest.raises(ValueError, match="'torchvision.vit_b_8' is not a model .* vit_b_16"):
        td.Backbone(name="torchvision.vit_b_8", weights=None).create()
    with pytest.raises(ValueError, match="must be a file, or null .* got 'pretrained'"):
        td.Backbone(name="torchvision.vit_b_16").create()
    other = dataclasses.replace(described, weights=str(file), args=described.args | {"mlp_dim": 48})
    with pytest.raises(ValueError, match="belongs to another backbone: 6 tensors of another shape"):
        other.create()


@torch.no_grad()
def test_a_model_of_torchvision_without_a_head_gives_its_class_token(tmp_path):
    vit, _ = backbone("torchvision")
    vit.heads = torch.nn.Identity()
    model = td.wrap(vit, decode=td.DARDecoder(num_classes=3))
    assert model(images(1, 64, 64)).shape[1] == 3
    model = td.wrap(vit)
    assert torch.equal(model(images(1, 64, 64)), vit(images(1, 64, 64)))
    model.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images(1, 64, 64)), vit(images(1, 64, 64)))


@torch.no_grad()
def test_siglip_is_built_again_from_its_folder(tmp_path):
    vit = of_class("SiglipVisionModel")
    vit.save_pretrained(tmp_path / "vit")
    vit = type(vit).from_pretrained(tmp_path / "vit").eval()
    model = td.wrap(vit, reduce=td.ToMe(r=3), adapt=td.AdaptFormer(dim=4)).eval()
    model.save_pretrained(tmp_path / "out")
    loaded = td.load(tmp_path / "out")
    assert loaded.backbone.name == "transformers.SiglipVisionModel"
    assert torch.equal(loaded(images(1, 64, 64)), model(images(1, 64, 64)))


@pytest.mark.parametrize(
    ("name", "mean"), [("hf siglip", 0.5), ("hf owlvit", 0.48145466), ("torchvision", 0.485)]
)
def test_images_are_normalised_as_the_published_models_were_trained(name, mean):
    assert td.wrap(backbone(name)[0]).anatomy.statistics[0][0] == mean
