"""Checkpoints as people have them: found by structure, used whole, or refused in one line."""

import pytest
import timm
import torch
import transformers
from examples import TINY, images, perturbed, tiny_vit
from safetensors.torch import save_file
from test_convert import REGISTERS, as_dinov2

import tokendial as td
from tokendial.backbones import load_weights

SIZES = {"image_size": 32, "patch_size": 4, "hidden_size": 48, "num_attention_heads": 3}
SIZES |= {"num_hidden_layers": 4, "intermediate_size": 192, "layer_norm_eps": 1e-6}
GATED = {"mlp_ratio": 16 / 3}  # 128 units, each with a gate
CLIP = "vit_base_patch16_clip_quickgelu_224"


def under(prefix, vit):
    return {f"{prefix}{name}": value for name, value in vit.state_dict().items()}


def lightning(vit):
    criterion = {"criterion.weight": torch.ones(5)}
    return {"epoch": 3, "state_dict": under("model.", vit) | criterion, "optimizer_states": [{}]}


def dino(vit):
    teacher = under("backbone.", vit) | {"head.mlp.0.weight": torch.ones(3, 3)}
    student = under("module.backbone.", perturbed(vit))
    return {"student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 9}


def compiled(vit):
    return {"model_ema": under("module._orig_mod.", vit), "model": under("", vit)}


def openai_clip(vit):
    """OpenAI's names, of the image tower and beside it one of the text tower."""
    state = {}
    for name, value in vit.state_dict().items():
        if name == "head.weight":
            name, value = "proj", value.T
        for ours, theirs in (
            ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"),
            ("cls_token", "class_embedding"), ("norm_pre", "ln_pre"),
            ("blocks.", "transformer.resblocks."), (".norm", ".ln_"), (".qkv.", ".in_proj_"),
            ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"ln_post.{name.removeprefix('norm.')}"
        state[f"visual.{name}"] = value.squeeze() if "_embedding" in name else value
    del state["visual.head.bias"]
    return state | {
        "transformer.resblocks.0.ln_1.bias": torch.ones(4),
        "logit_scale": torch.ones(()),
    }


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        (lambda vit: vit.state_dict(), None),
        (lightning, "1 criterion"),
        (dino, "56 student, 1 head"),
        (compiled, "56 model"),
        (lambda vit: {"state_dict": under("encoder.", vit) | {"fc.bias": torch.ones(1)}}, "1 fc"),
    ],
    ids=["plain", "lightning", "dino", "averaged", "prefix"],
)
@torch.no_grad()
def test_the_vit_in_a_checkpoint_is_found(tmp_path, caplog, content, left_out):
    vit, path = tiny_vit(), tmp_path / "checkpoint.ckpt"
    torch.save(content(vit), path)
    loaded = td.Backbone(name="vit_tiny_patch16_224", weights=str(path), args=TINY).create().eval()
    assert torch.equal(loaded(images()), vit(images()))
    assert [record.message for record in caplog.records] == (
        [f"{path}: left out: {left_out}"] if left_out else []
    )


@pytest.mark.parametrize(
    ("name", "cls", "args", "ours", "left_out"),
    [
        ("vit_tiny_patch16_224", "ViTForImageClassification", {}, {}, None),
        ("vit_tiny_patch16_224", "ViTModel", {}, {"num_classes": 0}, "2 pooler"),
        ("deit_tiny_distilled_patch16_224", "DeiTForImageClassificationWithTeacher", {}, {}, None),
        ("vit_small_patch14_dinov2", "Dinov2Model", {}, {}, "1 mask_token"),
        ("vit_small_patch14_dinov2", "Dinov2ForImageClassification", {}, {}, "2 head"),
        (REGISTERS.name, "Dinov2WithRegistersModel", {"num_register_tokens": 4}, {}, "1 mask"),
        ("vit_giant_patch14_dinov2", "Dinov2Model", {"use_swiglu_ffn": True}, GATED, "1 mask"),
        (
            CLIP,
            "CLIPVisionModelWithProjection",
            {"projection_dim": 5, "layer_norm_eps": 1e-5},
            {},
            None,
        ),
    ],
)
@pytest.mark.parametrize("written", [True, False])
@torch.no_grad()
def test_models_of_transformers_give_the_same_features(
    tmp_path, caplog, name, cls, args, ours, left_out, written
):
    kind = getattr(transformers, cls)
    theirs = perturbed(kind(kind.config_class(**(SIZES | args), num_labels=5)))
    if written:  # its files have older names than its modules
        theirs.save_pretrained(tmp_path / "it")
    else:
        torch.save(theirs.state_dict(), tmp_path / "it")
    backbone = td.Backbone(
        name=name, weights=str(tmp_path / "it"), args=TINY | {"num_classes": 5} | ours
    )
    loaded = backbone.create().eval()
    both = [td.wrap(model.eval()) for model in (loaded, theirs)]
    features = [model.feature_map(images()) for model in both]
    torch.testing.assert_close(*features, atol=1e-4, rtol=1e-4)
    if left_out is None:
        torch.testing.assert_close(*(model(images()) for model in both), atol=1e-4, rtol=1e-4)
    else:
        assert f"left out: {left_out}" in caplog.text


@torch.no_grad()
def test_the_image_tower_of_openai_is_taken_out_of_its_file(tmp_path, caplog):
    vit = perturbed(timm.create_model(CLIP, **(TINY | {"num_classes": 5}))).eval()
    vit.head.bias.zero_()
    torch.save(openai_clip(vit), tmp_path / "clip.pt")
    again = timm.create_model(CLIP, **(TINY | {"num_classes": 5})).eval()
    load_weights(again, tmp_path / "clip.pt")
    assert torch.equal(again(images()), vit(images()))
    assert "left out: 1 transformer, 1 logit_scale" in caplog.text


@torch.no_grad()
def test_registers_of_dinov2_are_read_at_another_size(tmp_path):
    vit = perturbed(REGISTERS.create())
    torch.save(as_dinov2(vit), tmp_path / "dinov2.pth")
    save_file(vit.state_dict(), tmp_path / "ours.safetensors")
    args = REGISTERS.args | {"img_size": 48}
    read = [
        td.Backbone(name=REGISTERS.name, weights=str(tmp_path / file), args=args).create().eval()
        for file in ("dinov2.pth", "ours.safetensors")
    ]
    assert torch.equal(*(model(images(1, 48, 48)) for model in read))


def test_a_run_is_read_by_its_best_model(tmp_path):
    vit = tiny_vit()
    td.wrap(vit, adapt=td.FullFineTuning()).save_pretrained(tmp_path / "best")
    loaded = td.Backbone(name="vit_tiny_patch16_224", weights=str(tmp_path), args=TINY).create()
    assert torch.equal(loaded.norm.bias, vit.norm.bias)


def wide(vit, folder):
    """A saved model says the size of its images."""
    args = TINY | {"img_size": (16, 64)}
    backbone = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=args)
    td.wrap(vit, backbone=backbone).save_pretrained(folder)
    return folder


def converted(vit, folder):
    """A converted file says the rows and columns of its positions."""
    square = tiny_vit()
    torch.save({"model": square.state_dict()}, folder / "square.pth")
    backbone = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    at = td.convert_weights(folder / "square.pth", backbone).resized_to((16, 64))
    vit.load_state_dict(at.tensors)
    return at.save(folder / "wide.safetensors")


@pytest.mark.parametrize("content", [wide, converted])
@torch.no_grad()
def test_positions_that_are_no_square_are_resized_where_the_file_says_their_rows(tmp_path, content):
    """4 rows of 16 patches are as many as 8 of 8; the mean over rows has to stay one over rows."""
    vit = tiny_vit(img_size=(16, 64))
    path = content(vit, tmp_path)
    if content is wide:
        rows = torch.arange(4.0).repeat_interleave(16)
        vit.pos_embed[0, 1:] = rows[:, None].expand(-1, 48)
        path = content(vit, tmp_path)
    loaded = td.Backbone(name="vit_tiny_patch16_224", weights=str(path), args=TINY).create()
    before = vit.pos_embed[0, 1:].reshape(4, 16, 48)
    after = loaded.pos_embed[0, 1:].reshape(8, 8, 48)
    expected = torch.nn.functional.interpolate(
        before.permute(2, 0, 1)[None], size=(8, 8), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(after, expected[0].permute(1, 2, 0), atol=1e-5, rtol=0)
    assert torch.equal(loaded.pos_embed[0, 0], vit.pos_embed[0, 0])


@torch.no_grad()
def test_positions_of_the_models_own_size_stay(tmp_path):
    """14 x 14 is what the name of the model stands for, and also 7 x 28."""
    args = TINY | {"img_size": (28, 112), "depth": 1}
    vit = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=args).create()
    save_file(vit.state_dict(), tmp_path / "wide.safetensors")
    again = td.Backbone(
        name="vit_tiny_patch16_224", weights=str(tmp_path / "wide.safetensors"), args=args
    ).create()
    assert torch.equal(again.pos_embed, vit.pos_embed)


def no_square(vit):
    state = vit.state_dict()
    return state | {"pos_embed": torch.ones(1, 1 + 96, 48)}


def trained_alone(vit, folder):
    td.wrap(vit, adapt=td.AdaptFormer(dim=4)).save_pretrained(folder)


def adapted(vit, folder):
    backbone = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    td.wrap(vit, adapt=td.AdaptFormer(dim=4), backbone=backbone).save_pretrained(folder)


def pointer(vit, folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def changed(**tensors):
    return lambda vit: vit.state_dict() | {n.replace("__", "."): t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            no_square,
            "has positions of 97 tokens, which is not 1 and a square of patches; to resize",
        ),
        (trained_alone, r"only what was trained \(16 adapter, 2 vit\), not a whole backbone"),
        (adapted, "a model that was fine-tuned with an adapter; model.weights takes"),
        (pointer, "is a pointer of Git LFS instead of the file .* `git lfs pull`"),
        (
            lambda vit: {"a": under("student.", vit), "b": 3},
            "does not hold tensors by name.* it holds a, b",
        ),
        (
            lambda vit: under("student.", vit) | under("teacher.", vit),
            "several ViTs, under 'student.', 'teacher.': save one of them alone",
        ),
        (
            changed(extra__weight=torch.ones(2)),
            r"\(names of timm\) belongs .* 1 unexpected; .* extra.weight",
        ),
        (
            changed(pre_logits__fc__weight=torch.ones(2)),
            "1 unexpected; the first is pre_logits.fc.weight",
        ),
        (
            changed(norm__bias=torch.full((48,), torch.nan)),
            "norm.bias must hold finite numbers, got NaN",
        ),
        (changed(norm__bias=torch.full((48,), torch.inf)), "norm.bias must hold .*, got infinity"),
        (
            changed(norm__bias=torch.ones(48, dtype=torch.bool)),
            "norm.bias must be of a float .*bool",
        ),
        (changed(norm__bias=torch.ones(48).int()), "norm.bias must be of a float type.*int32"),
        (changed(norm__bias=torch.ones(48) + 1j), "norm.bias must be of a float type.*complex64"),
        (changed(norm__bias=torch.ones(48).to_sparse()), "norm.bias must be a dense tensor"),
        (changed(norm__bias=3), "norm.bias must be a dense tensor, got int"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_says_what_was_found(tmp_path, content, message):
    vit, path = tiny_vit(), tmp_path / "checkpoint.pth"
    if content in (trained_alone, adapted, pointer):
        path = tmp_path
        content(vit, path)
    else:
        torch.save(content(vit), path)
    with pytest.raises(ValueError, match=f"model.weights: .*{message}") as raised:
        td.Backbone(name="vit_tiny_patch16_224", weights=str(path), args=TINY).create()
    assert "\n" not in str(raised.value)


def test_a_layer_before_the_head_goes_with_the_head(tmp_path, caplog):
    state = tiny_vit().state_dict() | {"pre_logits.fc.weight": torch.ones(2)}
    torch.save(state, tmp_path / "old.pth")
    load_weights(tiny_vit(num_classes=3), tmp_path / "old.pth")
    assert "left out: 2 head, 1 pre_logits" in caplog.text
