"""Released weight files: which kind a file is, its tensors by timm's names, what is refused."""

import argparse
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import GOLDEN, TINY, images, perturbed
from safetensors.torch import load_file
from timm.layers.mlp import GluMlp

import tokendial as td
from tokendial.backbones import load_weights
from tokendial.backbones.positions import resize_positions

SIZES = {name: TINY[name] for name in ("img_size", "embed_dim", "depth", "num_heads")}
PLAIN = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
DISTILLED = td.Backbone(name="deit_tiny_distilled_patch16_224", weights=None, args=TINY)
DINOV2 = td.Backbone(name="vit_small_patch14_dinov2", weights=None, args=SIZES | {"patch_size": 4})
REGISTERS = td.Backbone(name="vit_small_patch14_reg4_dinov2", weights=None, args=DINOV2.args)
HEADLESS = PLAIN.with_head(0)
MAE_DECODER = ("decoder_embed.weight", "decoder_blocks.0.norm1.bias", "mask_token")
DAR_PARTS = {
    "backbone.blocks.0.adapter.down_proj.weight": "adapter",
    "backbone.blocks.0.compensator.down_conv2.0.weight": "compensator",
    "backbone.blocks.1.compensator.down_conv2.0.weight": "compensator",
    "backbone.blocks.0.token_mask_gen.conv.bias": "token_mask_gen",
    "backbone.blocks.0.scale": "scale",
    "decode_head.convs.0.bn.num_batches_tracked": "decode_head",
    "d_head_s.0.weight": "d_head_s",
    "backbone_t.mask_token": "backbone_t",
}


def as_dinov2(vit):
    """Facebook's names; with registers, the class token's position is a row of its own."""
    state = dict(vit.state_dict()) | {"mask_token": torch.zeros(1, vit.embed_dim)}
    if isinstance(vit.blocks[0].mlp, GluMlp):
        for ours, theirs in (("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")):
            state = {name.replace(ours, theirs): value for name, value in state.items()}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = 0.25 * state["cls_token"]
        state["cls_token"] = 0.75 * state["cls_token"]
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state


def as_dar(vit):
    state = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    return state | {name: torch.ones(()) for name in DAR_PARTS}


def as_wrapped(vit):
    return {"model": vit.state_dict()}


def as_augreg(vit):
    """Google's names and layouts, written out."""
    state = {name: value.numpy() for name, value in vit.state_dict().items()}
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "head.weight" in state:
        arrays |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for number in range(len(vit.blocks)):
        ours, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for our_norm, their_norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{their_norm}/scale"] = state[f"{ours}{our_norm}.weight"]
            arrays[f"{theirs}{their_norm}/bias"] = state[f"{ours}{our_norm}.bias"]
        qkv = zip(
            ("query", "key", "value"),
            np.split(state[f"{ours}attn.qkv.weight"], 3),
            np.split(state[f"{ours}attn.qkv.bias"], 3),
            strict=True,
        )
        for part, weight, bias in qkv:
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        out = state[f"{ours}attn.proj.weight"].T
        arrays[f"{attention}out/kernel"] = out.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for layer in (1, 2):
            dense = f"{theirs}MlpBlock_3/Dense_{layer - 1}/"
            arrays[f"{dense}kernel"] = state[f"{ours}mlp.fc{layer}.weight"].T
            arrays[f"{dense}bias"] = state[f"{ours}mlp.fc{layer}.bias"]
    return arrays


def write(folder: Path, content, name="released.pth") -> Path:
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    return path


def blank(name: str):
    """The timm model at its real size, whose tensors are one stored number each."""
    with torch.device("meta"):
        vit = td.Backbone(name=name, weights=None).create()
    state = {n: torch.zeros(()).expand(value.shape) for n, value in vit.state_dict().items()}
    vit.state_dict = lambda: state
    return vit


@pytest.mark.parametrize(
    ("backbone", "release", "file", "kind"),
    [
        (DINOV2, as_dinov2, "dinov2.pth", "DINOv2"),
        (REGISTERS, as_dinov2, "dinov2_reg4.pth", "DINOv2"),
        (DINOV2, as_dar, "dar.pth", "DAR"),
        (PLAIN, as_wrapped, "deit.pth", "DeiT"),
        (DISTILLED, as_wrapped, "deit_distilled.pth", "DeiT"),
        (HEADLESS, as_wrapped, "mae.pth", "MAE"),
        (PLAIN, as_augreg, "augreg.npz", "AugReg"),
        (HEADLESS, as_augreg, "augreg_without_head.npz", "AugReg"),
    ],
)
@torch.no_grad()
def test_a_converted_file_gives_the_model_that_it_came_from(
    tmp_path, backbone, release, file, kind
):
    vit = perturbed(backbone.create())
    converted = td.convert_weights(write(tmp_path, release(vit), file), backbone)
    assert (converted.kind, converted.model) == (kind, backbone.name)
    out = converted.save()
    assert out == (tmp_path / file).with_suffix(".safetensors")
    again = td.Backbone(name=backbone.name, weights=str(out), args=backbone.args).create().eval()
    torch.testing.assert_close(again(images()), vit(images()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("release", "file"), [(as_wrapped, "mae.pth"), (as_augreg, "augreg.npz"), (as_dar, "dar.pth")]
)
@torch.no_grad()
def test_a_file_without_a_head_serves_a_model_with_a_fresh_one(tmp_path, release, file):
    backbone = DINOV2 if release is as_dar else HEADLESS
    vit = perturbed(backbone.create())
    converted = td.convert_weights(write(tmp_path, release(vit), file), backbone)
    assert not converted.has_head
    assert "no classifier head" in converted.summary()
    fresh = backbone.with_head(5).create().eval()
    load_weights(fresh, converted.save())
    assert fresh(images()).shape == (2, 5)
    torch.testing.assert_close(
        fresh.forward_features(images()), vit.forward_features(images()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("vit_small_patch14_dinov2", as_dinov2),
        ("vit_base_patch14_dinov2", as_dinov2),
        ("vit_small_patch14_reg4_dinov2", as_dinov2),
        ("vit_base_patch14_reg4_dinov2", as_dinov2),
        ("vit_base_patch14_dinov2", as_dar),
        ("deit_tiny_patch16_224", as_wrapped),
        ("deit_small_patch16_224", as_wrapped),
        ("deit_base_patch16_384", as_wrapped),
        ("deit_tiny_distilled_patch16_224", as_wrapped),
        ("deit_base_distilled_patch16_384", as_wrapped),
        ("vit_base_patch16_224.mae", as_wrapped),
        ("vit_tiny_patch16_224", as_augreg),
        ("vit_tiny_patch16_384", as_augreg),
        *(
            pytest.param(name, release, marks=pytest.mark.slow)
            for name, release in (
                ("vit_large_patch14_dinov2", as_dinov2),
                ("vit_large_patch14_reg4_dinov2", as_dinov2),
                ("vit_giant_patch14_dinov2", as_dinov2),
                ("vit_large_patch16_224.mae", as_wrapped),
                ("vit_huge_patch14_224.mae", as_wrapped),
            )
        ),
    ],
)
def test_the_shapes_say_which_model_it_is(tmp_path, name, release):
    vit = blank(name)
    file = "released.npz" if release is as_augreg else "released.pth"
    converted = td.convert_weights(write(tmp_path, release(vit), file))
    assert converted.model == name
    shapes = {n: value.shape for n, value in converted.tensors.items()}
    assert shapes == {n: value.shape for n, value in vit.state_dict().items()}


def test_the_released_tensors_of_dar_give_the_plain_backbone(tmp_path):
    listed = json.loads((GOLDEN / "dar_state_dict.json").read_text())
    state = {
        name: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for name, shape, dtype in listed["state_dict"]
    }
    converted = td.convert_weights(write(tmp_path, state))
    assert converted.model == "vit_base_patch14_dinov2"
    assert {f"backbone.{name}" for name in converted.tensors} == set(listed["pretrained_keys"])
    assert converted.summary() == (
        "DAR weights of vit_base_patch14_dinov2, 174 tensors, no classifier head; left out: "
        "12 scale, 48 adapter, 96 compensator, 24 token_mask_gen, 14 decode_head"
    )
    trained = {name: state[name] for name in listed["finetune_file_keys"]}
    with pytest.raises(ValueError, match=r"holds only what DAR trained \(12 scale, .*14 decode_h"):
        td.convert_weights(write(tmp_path, trained))


def test_what_dar_adds_is_left_out_and_counted(tmp_path):
    path = write(tmp_path, as_dar(DINOV2.create()))
    left_out = td.convert_weights(path, DINOV2).left_out
    assert left_out == {part: list(DAR_PARTS.values()).count(part) for part in DAR_PARTS.values()}


def test_half_precision_stays(tmp_path):
    state = PLAIN.create().half().state_dict()
    converted = td.convert_weights(write(tmp_path, {"model": state}), PLAIN)
    assert {value.dtype for value in converted.tensors.values()} == {torch.float16}


def test_tensors_that_share_memory_are_written_each(tmp_path):
    state = PLAIN.create().state_dict()
    state["norm.weight"] = state["norm.bias"] = torch.arange(96.0)[::2]
    converted = td.convert_weights(write(tmp_path, {"model": state}), PLAIN)
    written = load_file(converted.save())
    assert torch.equal(written["norm.weight"], state["norm.weight"])
    assert torch.equal(written["norm.bias"], state["norm.bias"])


def damaged(release, backbone, drop=(), **changed):
    content = release(backbone.create())
    state = content.get("model", content)
    state |= {name.replace("__", "."): value for name, value in changed.items()}
    for name in drop:
        del state[name]
    return content


@pytest.mark.parametrize(
    ("release", "backbone", "change", "message"),
    [
        (as_wrapped, PLAIN, {"drop": ["norm.bias"]}, "1 missing: norm.bias."),
        (as_wrapped, PLAIN, {"drop": ["head.bias"]}, "1 missing: head.bias."),
        (
            as_wrapped,
            DISTILLED,
            {"drop": ["head_dist.weight", "head_dist.bias"]},
            "2 missing: head_dist.weight, head_dist.bias.",
        ),
        (
            as_wrapped,
            HEADLESS,
            {"drop": [f"blocks.3.{n}.{w}" for n in ("norm1", "norm2") for w in ("weight", "bias")]},
            "4 missing: blocks.3.norm1.weight, blocks.3.norm1.bias, blocks.3.norm2.weight, ...",
        ),
        (
            as_dinov2,
            REGISTERS,
            {"drop": ["cls_token", "pos_embed"]},
            "2 missing: cls_token, pos_embed",
        ),
        (as_dinov2, REGISTERS, {"drop": ["mask_token"]}, "1 missing: mask_token"),
        (as_dinov2, DINOV2, {"extra__weight": torch.ones(1)}, "1 unexpected: extra.weight."),
        (
            as_wrapped,
            PLAIN,
            {"norm__bias": torch.ones(1)},
            "1 of another shape: norm.bias [1] for [48].",
        ),
        (
            as_dinov2,
            DINOV2,
            {"pos_embed": torch.ones(1, 50, 48)},
            "pos_embed [1, 50, 48] for [1, 65, 48]",
        ),
        (as_dar, DINOV2, {"drop": ["backbone.norm.bias"]}, "1 missing: norm.bias."),
        (as_dar, DINOV2, {"other__head": torch.ones(1)}, "1 unexpected: other.head."),
        (
            as_wrapped,
            PLAIN,
            {"norm__bias": torch.ones(48, dtype=torch.int8)},
            "norm.bias must be of a float type, got torch.int8.",
        ),
        (
            as_wrapped,
            PLAIN,
            {"norm__bias": torch.full((48,), torch.nan)},
            "norm.bias must hold finite numbers, got NaN.",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_one_line(tmp_path, release, backbone, change, message):
    path = write(tmp_path, damaged(release, backbone, **change))
    with pytest.raises(ValueError, match="released.pth") as raised:
        td.convert_weights(path, backbone)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding/bias": None}, "1 missing: embedding/bias."),
        ({"head/bias": None}, "1 missing: head/bias."),
        ({"pre_logits/bias": np.ones(48)}, "1 unexpected: pre_logits/bias."),
        ({"cls": np.ones((1, 48))}, "1 of another shape: cls [1, 48] for [1, 1, 48]."),
        ({"cls": np.ones((1, 1, 48), int)}, "cls must be of a float type, got int64."),
        (
            {"cls": np.full((1, 1, 48), np.inf)},
            "cls must hold finite numbers, got NaN or infinity.",
        ),
        ({"cls": np.array([{}])}, "needs pickled objects, which are not loaded."),
    ],
)
def test_a_numpy_file_that_is_not_whole_is_one_line(tmp_path, change, message):
    arrays = as_augreg(PLAIN.create()) | change
    arrays = {name: value for name, value in arrays.items() if value is not None}
    with pytest.raises(ValueError, match="released.npz") as raised:
        td.convert_weights(write(tmp_path, arrays, "released.npz"), PLAIN)
    assert message in str(raised.value)


def test_a_numpy_file_does_not_leave_tensors_of_the_model_random(tmp_path):
    plain = td.Backbone(name=DINOV2.name, weights=None, args=DINOV2.args | {"init_values": None})
    path = write(tmp_path, as_augreg(plain.create()), "released.npz")
    with pytest.raises(ValueError, match="8 missing: blocks.0.ls1.gamma, blocks.0.ls2.gamma, "):
        td.convert_weights(path, DINOV2)


def test_what_pre_training_alone_needs_is_left_out_and_counted(tmp_path):
    vit = HEADLESS.create()
    content = {"model": vit.state_dict() | dict.fromkeys(MAE_DECODER, torch.ones(1))}
    converted = td.convert_weights(write(tmp_path, content), HEADLESS)
    assert converted.kind == "MAE"
    assert converted.left_out == {"decoder_embed": 1, "decoder_blocks": 1, "mask_token": 1}
    assert converted.tensors.keys() == vit.state_dict().keys()


def test_a_checkpoint_of_dino_is_converted(tmp_path):
    name = "vit_small_patch16_224"
    state = {f"backbone.{n}": v for n, v in blank(name).state_dict().items() if "head" not in n}
    head = {"head.last_layer.weight_g": torch.ones(1)}
    path = write(tmp_path, {"student": {"x": torch.ones(1)}, "teacher": state | head})
    converted = td.convert_weights(path)
    assert converted.summary() == (
        f"DINO weights of {name}.dino, 150 tensors, no classifier head; left out: 1 student, 1 head"
    )


@pytest.mark.parametrize("file", ["released.pth", "released.npz"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:3000], lambda data: b"", lambda data: b"<html>\nnot found</html>"]
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, file, damage):
    path = write(tmp_path, {"cls_token": torch.ones(9000)}, file)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{file} is damaged or not a weight file of") as raised:
        td.convert_weights(path)
    assert "\n" not in str(raised.value)


def test_objects_are_not_unpickled(tmp_path):
    content = as_wrapped(PLAIN.create()) | {"args": Fraction(1, 10)}
    with pytest.raises(
        ValueError, match=r"released.pth needs pickled objects \(fractions.Fraction"
    ):
        td.convert_weights(write(tmp_path, content), PLAIN)


def test_arguments_of_training_are_read_as_values(tmp_path):
    content = as_wrapped(PLAIN.create()) | {"args": argparse.Namespace(lr=0.1)}
    assert td.convert_weights(write(tmp_path, content), PLAIN).kind == "DeiT"


def test_a_file_of_another_network_says_what_it_holds(tmp_path):
    path = write(tmp_path, {"conv1.weight": torch.ones(64, 3, 7, 7)})
    with pytest.raises(
        ValueError, match=r"no ViT that is known \(1 conv1\); expected are names of"
    ):
        td.convert_weights(path)


@pytest.mark.parametrize("content", [torch.ones(3), {}, {"epoch": 3}, {0: torch.ones(1)}, [1, 2]])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="released.pth is not a weight file"):
        td.convert_weights(write(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        {"mask_token": torch.ones(1, 48), "patch_embed.proj.weight": torch.ones(48)},
        # DeiT's tensors, but not as DeiT's file holds them: timm has many models of these shapes.
        blank("deit_tiny_patch16_224").state_dict(),
    ],
)
def test_a_model_that_the_tensors_do_not_say_has_to_be_given(tmp_path, content):
    with pytest.raises(ValueError, match=r"do not say which timm model .* give the model"):
        td.convert_weights(write(tmp_path, content))


def test_the_model_has_to_be_a_vision_transformer_of_timm(tmp_path):
    path = write(tmp_path, as_wrapped(PLAIN.create()))
    with pytest.raises(ValueError, match="must be a VisionTransformer of timm, got 'eva02_tiny"):
        td.convert_weights(path, "eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match="'vit_bas' is not a timm model"):
        td.convert_weights(path, "vit_bas")


def test_only_a_new_safetensors_file_is_written(tmp_path):
    path = write(tmp_path, as_wrapped(PLAIN.create()))
    before = path.read_bytes()
    converted = td.convert_weights(path, PLAIN)
    (tmp_path / "link.safetensors").symlink_to(path)
    for out in (path, tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match="out must be another file than the one that is conv"):
            converted.save(out)
    with pytest.raises(ValueError, match="out: no such folder: .*nowhere"):
        converted.save(tmp_path / "nowhere" / "vit.safetensors")
    with pytest.raises(ValueError, match="out must end in .safetensors, got .*vit.pth"):
        converted.save(tmp_path / "vit.pth")
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "link.safetensors"}


@torch.no_grad()
def test_the_command_line_converts_and_says_what(tmp_path, cli):
    name = "deit_tiny_patch16_224"
    vit = perturbed(td.Backbone(name=name, weights=None).create(), std=0.01)
    path, out = write(tmp_path, as_wrapped(vit)), tmp_path / "deit.safetensors"
    assert cli("weights", "convert", path, "--out", out) == (
        0,
        f"wrote {out}: DeiT weights of {name}, 152 tensors\n",
        "",
    )
    again = td.Backbone(name=name, weights=str(out)).create().eval()
    batch = images(1, 224, 224)
    assert torch.equal(again(batch), vit(batch))


@pytest.mark.parametrize("options", [[], ["--model", "vit_small_patch14_dinov2"]])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(tmp_path, cli, options):
    path = tmp_path / "released.pth"
    if options:
        write(tmp_path, as_dinov2(DINOV2.create()))
    code, out, err = cli("weights", "convert", path, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert str(path) in err
    assert err.count("\n") == 1
    assert not path.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(
    ("backbone", "release", "prefix", "offset"),
    [(DINOV2, as_dinov2, 1, 0.1), (REGISTERS, as_dinov2, 0, 0.0), (DISTILLED, as_wrapped, 2, 0.0)],
)
@torch.no_grad()
def test_positions_are_resized_as_the_released_code_does(
    tmp_path, backbone, release, prefix, offset
):
    vit = perturbed(backbone.create())
    converted = td.convert_weights(write(tmp_path, release(vit)), backbone).resized_to((40, 24))
    path = converted.save(tmp_path / "resized.safetensors")
    larger = replace(backbone, weights=str(path), args=backbone.args | {"img_size": (40, 24)})
    expected = resize_positions(vit.pos_embed, (10, 6), num_prefix_tokens=prefix, offset=offset)
    assert torch.equal(larger.create().pos_embed, expected)
    assert larger.create()(images(1, 40, 24)).isfinite().all()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("wide", "img_size must look like 224 or 224x320, got 'wide'"),
        ("0x224", "img_size must look like 224 or 224x320, got '0x224'"),
        ("224x100", r"img_size must be multiples of the patch size 16, got (224, 100)"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(tmp_path, cli, size, message):
    path = write(
        tmp_path, as_wrapped(td.Backbone(name="deit_tiny_patch16_224", weights=None).create())
    )
    code, out, err = cli("weights", "convert", path, "--img-size", size)
    assert (code, out, err) == (2, "", f"error: {message}.\n")
    assert not path.with_suffix(".safetensors").exists()


def test_the_command_line_resizes_positions(tmp_path, cli):
    vit = td.Backbone(name="deit_tiny_patch16_224", weights=None).create()
    path = write(tmp_path, as_wrapped(vit))
    assert cli("weights", "convert", path, "--img-size", "256x192")[0] == 0
    assert load_file(path.with_suffix(".safetensors"))["pos_embed"].shape == (1, 1 + 16 * 12, 192)
