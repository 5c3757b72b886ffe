"""Decoders: their arithmetic, and a wrapped model that ends in one."""

import pytest
import timm
import torch
import torch.nn.functional as F
from examples import golden, images, perturbed, split, tiny_vit

import tokendial as td
from tokendial.shape import ViTShape

DECODERS = {
    "linear": td.LinearDecoder(num_classes=3),
    "dar": td.DARDecoder(num_classes=3, channels=16),
    "mask_transformer": td.MaskTransformer(num_classes=3, num_heads=3),
    "upconv": td.UpConvDecoder(num_classes=3, channels=(16, 8)),
}
REDUCERS = {"none": None, "tome": td.ToMe(r=8), "evit": td.EViT(r=4), "ffn_merge": td.FFNMerge(r=8)}
SHAPE = ViTShape(depth=4, embed_dim=48, num_prefix_tokens=1, num_patches=64, has_class_token=True)


def dense(decode, reduce=None, adapt=None, **sizes):
    model = td.wrap(tiny_vit(num_classes=0, **sizes), reduce=reduce, adapt=adapt, decode=decode)
    perturbed(model.decoder)
    return model.eval()


@torch.no_grad()
def test_masks_of_the_mask_transformer_follow_the_definition():
    config = td.MaskTransformer(num_classes=5, dim=32, num_heads=2)
    decoder = perturbed(config.build(SHAPE), std=0.2)
    features = torch.randn(2, 48, 3, 4)
    x = decoder.project(features.flatten(2).transpose(1, 2))
    x = torch.cat([x, decoder.classes.expand(2, -1, -1)], dim=1)
    for block in decoder.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    x = decoder.norm(x)
    patches = x[:, :12] @ decoder.project_patches.weight.T
    classes = x[:, 12:] @ decoder.project_classes.weight.T
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = decoder.mask_norm(torch.einsum("bld,bkd->blk", patches, classes))
    expected = masks.reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_an_empty_batch_gives_the_logit_maps_of_no_image(decode):
    model = dense(decode, td.ToMe(r=8))
    assert model(images()[:0]).shape == (0, *model(images()).shape[1:])
    assert model.forward_pass(images()[:0]).logits.shape[0] == 0


@pytest.mark.parametrize("reduce", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_logits_are_the_decoder_on_the_restored_feature_map(decode, reduce):
    model = dense(decode, reduce)
    expected = model.decoder(model.feature_map(images()))
    torch.testing.assert_close(model(images()), expected)
    torch.testing.assert_close(model.forward_pass(images()).logits, expected)
    assert model.num_classes == 3
    side = 32 if isinstance(decode, td.DARDecoder | td.UpConvDecoder) else 8
    assert expected.shape == (2, 3, side, side)


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_gradients_reach_decoder_and_adapter_but_not_the_frozen_backbone(decode):
    model = dense(decode, td.ToMe(r=8), td.AdaptFormer(dim=4)).train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "adapter",
        "decoder",
    }


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_a_loaded_model_has_the_same_logits(tmp_path, decode):
    model = dense(decode, td.EViT(r=4), td.AdaptFormer(dim=4)).train()
    model(images())  # a BatchNorm keeps statistics, which are saved too
    model.eval().save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=tiny_vit(num_classes=0))
    assert loaded.decode_config == decode
    assert torch.equal(loaded(images()), model(images()))


@torch.no_grad()
def test_adapters_by_name_have_decoders_of_their_own(tmp_path):
    model = dense(DECODERS["dar"], td.ToMe(r=8), td.AdaptFormer(dim=4))
    before = model(images())
    model.add_adapter("other", td.LoRA(rank=2), decode=DECODERS["linear"])
    model.set_adapter("other")
    perturbed(model.decoder)
    other = model(images())
    assert other.shape == (2, 3, 8, 8)
    model.save_adapter("other", tmp_path)
    model.set_adapter("default")
    assert torch.equal(model(images()), before)
    model.load_adapter("again", tmp_path)
    model.set_adapter("again")
    torch.testing.assert_close(model(images()), other)


def test_the_cost_counts_the_decoder_but_not_among_what_adapters_train():
    plain = td.wrap(tiny_vit(num_classes=0), adapt=td.AdaptFormer(dim=4)).cost()
    cost = dense(DECODERS["dar"], adapt=td.AdaptFormer(dim=4)).cost()
    assert cost.trainable_params == plain.trainable_params
    # 8 x 8 patches to 16 channels, enlarged to 32 x 32, 16 channels to 16 and to 3.
    own = 64 * 48 * 16 + 16 * 32 * 32 * 4 + 32 * 32 * (16 * 16 + 16 * 3)
    own -= 5 * 48  # the class token is not normalised
    assert cost.macs - plain.macs == own


def test_the_cost_of_transposed_convolutions_counts_four_weights_for_each_output():
    plain = td.wrap(tiny_vit(num_classes=0)).cost().macs
    # 8 x 8 patches of 48 channels to 16 x 16 of 16, to 32 x 32 of 8, to 3 logit maps.
    own = 16 * 16 * 4 * 48 * 16 + 32 * 32 * (4 * 16 * 8 + 8 * 3)
    own -= 5 * 48  # the class token is not normalised
    assert dense(DECODERS["upconv"]).cost().macs - plain == own


@torch.no_grad()
def test_transposed_convolutions_follow_the_definition():
    decoder = perturbed(td.UpConvDecoder(num_classes=2, channels=(6,)).build(SHAPE), std=0.2)
    stage, features = decoder.stages[0], torch.randn(2, 48, 3, 4)
    stage.norm.running_var.uniform_(0.5, 2)
    expected = torch.zeros(2, 6, 8, 10) + stage.up.bias[:, None, None]
    for row in range(3):
        for column in range(4):
            spread = torch.einsum("bd,dckl->bckl", features[:, :, row, column], stage.up.weight)
            expected[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += spread
    expected = expected[:, :, 1:-1, 1:-1]
    deviation = (stage.norm.running_var + 1e-5).sqrt()
    normed = (expected - stage.norm.running_mean[:, None, None]) / deviation[:, None, None]
    scaled = normed * stage.norm.weight[:, None, None] + stage.norm.bias[:, None, None]
    weight = decoder.predict.weight[:, :, 0, 0]
    masks = (
        torch.einsum("bchw,kc->bkhw", scaled.relu(), weight) + decoder.predict.bias[:, None, None]
    )
    torch.testing.assert_close(decoder.eval()(features), masks)


def test_a_compensator_bridges_dense_models_too():
    model = dense(DECODERS["linear"], td.ToMe(r=8))
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom()))
    before = model(images())
    plugin.attach(model, source=8)
    model.set_degree(0)
    moved = model(images())
    plugin.detach(model)
    assert not torch.equal(model(images()), moved)
    model.set_degree(8)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.DARDecoder(num_classes=0), "num_classes must be an integer of at least 1"),
        (lambda: td.DARDecoder(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: td.UpConvDecoder(channels=()), r"channels must hold at least one .*, got \(\)"),
        (lambda: td.UpConvDecoder(channels=(8, 0)), "channels must be an integer of at least 1"),
        (lambda: dense(td.MaskTransformer(num_classes=2, num_heads=5)), "num_heads must divide"),
        (lambda: td.wrap(tiny_vit(), decode=td.DARDecoder()), "needs a backbone without a class"),
    ],
)
def test_bad_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def reference_model(case):
    meta, tensors = golden(case)
    cfg = meta["settings"]["backbone_cfg"]
    vit = timm.create_model(
        "vit_base_patch14_dinov2",
        img_size=cfg["img_size"],
        patch_size=cfg["patch_size"],
        embed_dim=cfg["embed_dim"],
        depth=cfg["depth"],
        num_heads=cfg["num_heads"],
        num_classes=0,
    )
    decode = td.DARDecoder(channels=meta["settings"]["decode_head_cfg"]["channels"], dropout=0.0)
    adapt = td.DARAdapter(dims=tuple(cfg["ft_cfg"]["bottleneck"]))
    model = td.wrap(vit, reduce=td.DAR(), adapt=adapt, decode=decode)
    return tensors, model, split(tensors, "weight.") | split(tensors, "extra.")


@pytest.mark.parametrize("case", ["dar_seg", "dar_seg_distill"])
@torch.no_grad()
def test_the_segmentation_model_equals_the_reference(case):
    tensors, model, state = reference_model(case)
    td.load_reference(model, state, "dar")
    logits = model.eval()(tensors["input"])
    close = {"atol": 5e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits, tensors["output.eval.logits_mask"], **close)
    sized = F.interpolate(logits.sigmoid(), tensors["input.label_mask"].shape[-2:], mode="bilinear")
    torch.testing.assert_close(sized, tensors["output.eval.prob_at_label_size"], **close)


def test_names_and_shapes_are_those_of_the_released_files():
    released = golden("dar_state_dict")[0]
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch14_dinov2", img_size=518, num_classes=0)
        model = td.wrap(vit, reduce=td.DAR(), adapt=td.DARAdapter(), decode=td.DARDecoder())
        state = {name: torch.empty(shape) for name, shape, _ in released["state_dict"]}
    td.load_reference(model, state, "dar")
    td.load_reference(model, {name: state[name] for name in released["finetune_file_keys"]}, "dar")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == released["trainable_param_count"]
    del state["decode_head.conv_seg.bias"]
    with pytest.raises(ValueError, match="missing: decoder.predict.bias"):
        td.load_reference(model, state, "dar")


@torch.no_grad()
def test_a_file_of_what_was_trained_goes_onto_the_backbone_at_hand():
    tensors, model, state = reference_model("dar_seg")
    model.vit.load_state_dict(split(tensors, "weight.backbone."))
    td.load_reference(model, split(tensors, "extra."), "dar")
    expected = tensors["output.eval.logits_mask"]
    torch.testing.assert_close(model.eval()(tensors["input"]), expected, atol=5e-4, rtol=1e-4)
    del state["decode_head.fusion_conv.bn.weight"], state["backbone.norm.bias"]
    with pytest.raises(ValueError, match=r"missing: vit.norm.bias, decoder.fuse.norm.weight\."):
        td.load_reference(model, state, "dar")
