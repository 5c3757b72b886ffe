import pytest
import torch
from examples import images
from transformers.models.yolos.modeling_yolos import YolosLayer
from zoo import EVERY, TIMM, backbone, own_output

import tokendial as td
from tokendial.tokens import Grouping

POOLING_PATCHES = {
    "mae",
    "siglip",
    "siglip average",
    "eva",
    "eva02",
    "eva02 large",
    "dinov3",
    "dinov3 swiglu",
    "perception encoder",
    "grouped queries",
    "hf dinov2",
    "hf dinov2 registers",
    "hf clip classifier",
    "hf siglip",
    "hf siglip headless",
    "hf siglip classifier",
    "hf siglip2",
    "hf siglip2 classifier",
    "hf ijepa",
    "hf ijepa classifier",
    "hf vitpose",
    "naflex",
    "naflex map",
    "naflex factorized",
    "naflex dinov3",
}


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_degree_0_equals_the_model_itself(name, square):
    vit, size = backbone(name, square=square)
    pictures = images(2, *size)
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    torch.testing.assert_close(model(pictures), own_output(vit)(pictures), atol=1e-5, rtol=0)


def last_ffn_tokens(model, pictures):
    """Logits, and how many tokens of an image the last block's FFN saw."""
    counts = []
    last = model.anatomy.blocks[-1]
    last = last.intermediate if isinstance(last, YolosLayer) else last.mlp
    hook = last.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[-2]))
    logits = model(pictures)
    hook.remove()
    return logits, counts[0]


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_patch_tokens_that_the_head_does_not_read_can_be_skipped(name, r):
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=r)).eval()
    whole, all_tokens = last_ffn_tokens(model, images(2, *size))
    model.skip_unread_patches = True
    lean, tokens = last_ffn_tokens(model, images(2, *size))
    torch.testing.assert_close(lean, whole, atol=1e-5, rtol=0)
    patches_are_read = name in POOLING_PATCHES
    assert tokens == (all_tokens if patches_are_read else model.anatomy.shape.num_prefix_tokens)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_an_empty_batch_gives_the_logits_of_no_image(name):
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=2)).eval()
    pictures = images(1, *size)
    assert model(pictures[:0]).shape == (0, *model(pictures).shape[1:])
    assert model.feature_map(pictures[:0]).shape == (0, *model.feature_map(pictures).shape[1:])


@pytest.mark.parametrize("name", ["vit", "dinov3"])
@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
@torch.no_grad()
def test_degree_0_equals_timm_at_any_size_with_dynamic_images(name, size):
    vit, _ = backbone(name, dynamic_img_size=True)
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    torch.testing.assert_close(model(images(2, *size)), vit(images(2, *size)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2 registers", "dinov3", "eva02"])
@torch.no_grad()
def test_feature_maps_at_degree_0_are_timms_intermediates(name):
    vit, size = backbone(name)
    pictures = images(2, *size)
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    for norm in (False, True):
        theirs = vit.forward_intermediates(
            pictures, indices=[0, 1], norm=norm, intermediates_only=True
        )
        ours = model.feature_maps(pictures, [2, 1], norm=norm)
        torch.testing.assert_close(ours[::-1], theirs)
    torch.testing.assert_close(model.feature_map(pictures), theirs[1])


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in TIMM if "rope" in name or "dino" in name),
        "hf dinov3",
        "hf yolos mid positions",
    ],
)
@torch.no_grad()
def test_merging_with_itself_changes_nothing_where_every_token_stays(name):
    # A reduction that reorders tokens and takes none away: positions have to follow.
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.EViT(keep_rate=0.5, layers=(1,)))
    prefix = model.anatomy.shape.num_prefix_tokens

    def reorder(layer, degree, tokens, attended):
        order = torch.arange(tokens.x.shape[1] - prefix).flip(0) + prefix
        keep = torch.cat([torch.arange(prefix), order]).expand(len(tokens.x), -1)
        return Grouping(keep, keep[:, :0], keep[:, :0], keep.shape[1])

    model.reducer.group = reorder
    pictures = images(2, *size)
    torch.testing.assert_close(model(pictures), own_output(vit)(pictures), atol=1e-5, rtol=0)


# The last of them gives up one token alone: then nothing is absorbed, and it is fused all the same.
@pytest.mark.parametrize(("keep_rate", "given_up"), [(0.25, 48), (62 / 64, 2), (63 / 64, 1)])
@torch.no_grad()
def test_fused_positions_are_restored_as_they_were_or_as_the_fused_token(vit, keep_rate, given_up):
    model = td.wrap(vit, reduce=td.EViT(keep_rate=keep_rate, layers=(2,)))
    *_, last = model.steps(images(), track=True)
    fused = last.tokens.origin[0, 1:] == last.tokens.x.shape[1] - 1
    assert fused.sum() == given_up
    own = model.feature_map(images(), layer=4)[0].flatten(1)[:, fused]
    shared = model.feature_map(images(), layer=4, dropped="fused")[0].flatten(1)[:, fused]
    assert (shared == shared[:, :1]).all()
    attended = vit.blocks[1].attn(vit.blocks[1].norm1(_tokens(vit, 1)))
    when_dropped = (_tokens(vit, 1) + attended)[0, 1:].T
    torch.testing.assert_close(own, when_dropped[:, fused])


def _tokens(vit, layers):
    x = vit._pos_embed(vit.patch_embed(images()))
    for block in vit.blocks[:layers]:
        x = block(x)
    return x


def test_another_way_to_restore_raises(vit):
    with pytest.raises(ValueError, match="dropped must be one of own, fused, got 'zero'"):
        td.wrap(vit).feature_map(images(), dropped="zero")


def test_both_heads_of_a_distilled_model_train():
    vit, size = backbone("deit distilled")
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.LinearProbe())
    model(images(2, *size)).sum().backward()
    assert vit.head.weight.grad.abs().sum() > 0
    assert vit.head_dist.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_is_not_there_has_no_feature_map(vit, layer):
    with pytest.raises(ValueError, match=rf"layer must lie in \[1, 4\] .*, got {layer}"):
        td.wrap(vit).feature_map(images(), layer=layer)


@pytest.mark.parametrize("degree", [-1, 33, 1.5, True, None])
def test_a_degree_that_is_not_offered_raises(vit, degree):
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got"):
        td.wrap(vit, reduce=td.ToMe(r=4)).set_degree(degree)


def test_an_r_that_is_not_offered_raises(vit):
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 99"):
        td.wrap(vit, reduce=td.ToMe(r=99))


@torch.no_grad()
def test_turning_the_dial_and_back_gives_the_same_bits(vit):
    model = td.wrap(vit, reduce=td.ToMe(r=4))
    before = model(images())
    model.set_degree(16)
    assert not torch.equal(model(images()), before)
    model.set_degree(4)
    assert torch.equal(model(images()), before)


def test_the_timm_model_is_left_as_it_is(vit):
    names = set(vit.state_dict())
    model = td.wrap(vit, reduce=td.ToMe(r=4), adapt=td.DenseAdapter(dim=4))
    assert model.vit is vit
    assert set(vit.state_dict()) == names


def test_gradients_stop_at_the_frozen_backbone(vit):
    model = td.wrap(vit, reduce=td.EViT(layers=(2,)), adapt=td.AdaptFormer(dim=4))
    model(images()).sum().backward()
    assert vit.blocks[0].mlp.fc1.weight.grad is None
    assert vit.head.weight.grad is not None
