"""The image towers of open_clip under the dial."""

import copy

import open_clip
import pytest
import torch
from examples import images, perturbed

import tokendial as td

SIDE = 32


def tiny_clip(model=open_clip.CLIP, **vision):
    torch.manual_seed(0)
    config = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": SIDE}
    text = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 49408}
    return perturbed(model(embed_dim=24, vision_cfg=config | vision, text_cfg=text), std=0.02)


KINDS = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "average, then norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "no norm before the blocks": {"no_ln_pre": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "LayerScale": {"ls_init_value": 0.3},
    "attentional pooling": {"attentional_pool": True, "attn_pooler_heads": 2},
    "patch dropout": {"patch_dropout": 0.5},
    "not a square": {"image_size": (SIDE, 2 * SIDE)},
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_degree_0_gives_what_encode_image_gives(name):
    clip = tiny_clip(**KINDS[name])
    model = td.wrap(clip.visual, reduce=td.ToMe(r=2))
    pictures = images(2, *model.anatomy.image_size)
    merged = model(pictures)
    model.set_degree(0)
    expected = clip.encode_image(pictures)
    torch.testing.assert_close(model(pictures), expected, atol=1e-5, rtol=1e-5)
    assert merged.shape == expected.shape
    assert not torch.allclose(merged, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["parallel", "cascade"])
@torch.no_grad()
def test_both_pools_of_coca(kind):
    clip = tiny_clip(attentional_pool=kind, attn_pooler_heads=2, width=24, head_width=8)
    pictures = images(2, SIDE, SIDE)
    model = td.wrap(clip.visual, reduce=td.ToMe(r=2))
    assert model(pictures).isfinite().all()
    model.set_degree(0)
    torch.testing.assert_close(model(pictures), clip.visual(pictures), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["average", "attentional pooling"])
@torch.no_grad()
def test_pooling_counts_a_merged_token_as_often_as_its_patches(name):
    """Equal patches: merging them changes nothing, if the pooling weighs tokens by size.

    Catches: a pooling that leaves the sizes out.
    """
    clip = tiny_clip(**KINDS[name])
    clip.visual.positional_embedding[1:] = clip.visual.positional_embedding[1]
    pictures = images(1, SIDE, SIDE)
    pictures[..., : SIDE // 2, :] = 0.5
    pictures[..., SIDE // 2 :, :] = -1.0
    model = td.wrap(clip.visual, reduce=td.ToMe(r=3))
    merged = model(pictures)
    model.set_degree(0)
    torch.testing.assert_close(merged, model(pictures), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_are_resized_as_open_clip_resizes_them():
    clip, larger = tiny_clip(), tiny_clip(image_size=48)
    state = clip.state_dict()
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    pictures = images(2, 48, 48)
    torch.testing.assert_close(
        td.wrap(clip.visual)(pictures), larger.encode_image(pictures), atol=1e-5, rtol=1e-5
    )
    wide = td.wrap(clip.visual).feature_map(images(1, 40, 64))
    assert wide.shape == (1, 48, 5, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_clip(), "CLIP of open_clip also has a text tower: wrap its `visual`"),
        (lambda: tiny_clip(qk_norm=True).visual, "its blocks are CustomResidualAttentionBlock"),
        (
            lambda: tiny_clip(timm_model_name="vit_tiny_patch16_224").visual,
            "holds a model of timm: wrap its `trunk`",
        ),
    ],
)
def test_other_parts_of_open_clip_say_what_to_wrap(make, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(make())


def test_images_that_do_not_fit_are_one_line():
    with pytest.raises(ValueError, match="divisible by the patch size 8x8, got 32x36"):
        td.wrap(tiny_clip().visual)(images(1, 32, 36))
    with pytest.raises(ValueError, match="images must be 32x64, got 32x32"):
        td.wrap(tiny_clip(image_size=(32, 64)).visual)(images(1, 32, 32))


def test_patch_dropout_is_refused_in_training_only():
    model = td.wrap(tiny_clip(patch_dropout=0.5).visual)
    assert model.eval()(images(1, SIDE, SIDE)).isfinite().all()
    with pytest.raises(ValueError, match=r"patch_dropout must be 0 to train .* got 0.5"):
        model.train()(images(1, SIDE, SIDE))


@torch.no_grad()
def test_a_saved_adapter_is_loaded_onto_the_tower(tmp_path):
    clip = tiny_clip()
    fresh = copy.deepcopy(clip.visual)
    model = td.wrap(clip.visual, reduce=td.ToMe(r=2), adapt=td.AdaptFormer(dim=4))
    for parameter in model.trainable_parameters():
        parameter += 0.05
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=fresh)
    assert torch.equal(loaded(images()), model.eval()(images()))
    with pytest.raises(ValueError, match=r"part of a model of open_clip: .*vit=clip.visual"):
        td.load(tmp_path)


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_a_compensator_changes_queries_and_values(merge):
    """Catches: a projection whose hook or weights the model does not use."""
    model = td.wrap(tiny_clip().visual, reduce=td.ToMe(r=2))
    before = model(images())
    torch.manual_seed(3)
    compensator = td.Compensator.for_model(model, td.ToCom(rank=2))
    for parameter in compensator.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    compensator.attach(model, source=0, merge=merge)
    assert not torch.allclose(model(images()), before, atol=1e-4)
    compensator.detach(model)
    assert torch.equal(model(images()), before)


@torch.no_grad()
def test_lora_is_merged_into_the_tower_that_clip_holds():
    clip = tiny_clip()
    targets = ("c_fc", "c_proj", "out_proj")
    model = td.wrap(clip.visual, adapt=td.LoRA(rank=2, target_modules=targets))
    plain = model(images())
    for parameter in model.trainable_parameters():
        parameter += 0.05
    tuned = model(images())
    assert not torch.allclose(tuned, plain, atol=1e-4)
    assert model.unwrap() is clip.visual
    torch.testing.assert_close(clip.encode_image(images()), tuned, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_degree_is_one_graph_for_the_compiler():
    model = td.wrap(tiny_clip().visual, reduce=td.ToMe(r=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))
