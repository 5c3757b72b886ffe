import pytest
import timm
import torch
import torch.nn.functional as F
from examples import golden, images, replay_noise, split, tiny_vit

import tokendial as td
from tokendial.backbones.positions import resize_positions
from tokendial.model.blocks import BlockRunner
from tokendial.reduce.dar import ada_loss
from tokendial.tokens import Tokens

MASKS = ("eval", "train")


def reference_block():
    """The block of the golden case, as a backbone of depth 1 whose embedding is not used."""
    _, tensors = golden("dar_block")
    model = wrapped(depth=1, img_size=42, patch_size=7)
    state = split(tensors, "weight.") | split(tensors, "extra.")
    state = {f"blocks.0.{name}": value for name, value in state.items()}
    own = {n.removeprefix("vit."): v for n, v in model.vit.state_dict().items()}
    rest = {name: value for name, value in own.items() if not name.startswith("blocks.")}
    td.load_reference(model, rest | state, system="dar")
    return tensors, model


def wrapped(**sizes):
    vit = timm.create_model(
        "vit_small_patch14_dinov2",
        **({"embed_dim": 48, "num_heads": 3, "num_classes": 0} | sizes),
    )
    return td.wrap(vit, reduce=td.DAR(target_ratio=0.5), adapt=td.DARAdapter(dims=(12, 8)))


def run_block(model, x):
    runner = BlockRunner(
        model.anatomy, model.reducer, model.degree, model.adapter, model.attention_kernel
    )
    return runner.run(1, Tokens(x, 1, (6, 6))).tokens


@torch.no_grad()
def test_a_block_equals_the_reference_at_inference():
    tensors, model = reference_block()
    tokens = run_block(model.eval(), tensors["input"])
    close = {"atol": 1e-4, "rtol": 1e-4}
    assert torch.equal(tokens.selected, tensors["output.eval.mask"].squeeze(-1))
    torch.testing.assert_close(tokens.x, tensors["output.eval.x"], **close)


def test_a_block_equals_the_reference_in_training(monkeypatch):
    tensors, model = reference_block()
    model.train().requires_grad_(True)
    replay_noise(monkeypatch, tensors["input.train.logistic_noise"].unsqueeze(1))
    x = tensors["input"].clone().requires_grad_(True)
    tokens = run_block(model, x)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(tokens.selected, tensors["output.train.mask"].squeeze(-1), **close)
    torch.testing.assert_close(tokens.x, tensors["output.train.x"], **close)
    (tokens.x * tensors["input.train.grad_output"]).sum().backward()
    gradients = split(tensors, "output.train.grad.")
    torch.testing.assert_close(x.grad, gradients.pop("input"), atol=1e-4, rtol=1e-3)
    own = dict(model.named_parameters())
    for name, value in gradients.items():
        ours = own[td.reference.wrapped_name(f"blocks.0.{name}", "dar")]
        torch.testing.assert_close(ours.grad, value, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_adapter_and_compensator_equal_the_reference():
    tensors, model = reference_block()
    from tokendial.tokens import Tokens

    branch, _ = model.adapter.beside_ffn(1, Tokens(tensors["input"], 1, (6, 6)), None)
    expected = tensors["output.adapter"].clone()
    expected[:, 1:] += tensors["output.compensator"]
    torch.testing.assert_close(branch / model.adapter.scales[0], expected, atol=1e-4, rtol=1e-4)


def reference_backbone():
    meta, tensors = golden("dar_backbone")
    cfg = meta["settings"]["backbone_cfg"]
    model = wrapped(
        depth=cfg["depth"], img_size=cfg["img_size"], patch_size=7, dynamic_img_size=True
    )
    state = split(tensors, "weight.") | split(tensors, "extra.")
    state.pop("mask_token", None)
    td.load_reference(model, state, system="dar")
    return tensors, model


@pytest.mark.parametrize("size", ["", "other_size_"])
@torch.no_grad()
def test_a_batch_equals_the_reference_image_by_image(size):
    tensors, model = reference_backbone()
    pictures = tensors["input.other_size" if size else "input"]
    outcome = model.eval().forward_pass(pictures)
    masks = torch.stack([tokens.selected[:, 1:] for tokens in outcome.tokens], dim=1)
    assert torch.equal(masks, tensors[f"output.eval.{size}token_select"].squeeze(-1))
    close = {"atol": 2e-4, "rtol": 0}
    expected = split(tensors, f"output.eval.{size}")
    torch.testing.assert_close(outcome.tokens[-1].x, expected["x_prenorm"], **close)
    torch.testing.assert_close(outcome.features[:, 0], expected["x_norm_clstoken"], **close)
    torch.testing.assert_close(outcome.features[:, 1:], expected["x_norm_patchtokens"], **close)


@torch.no_grad()
def test_register_tokens_equal_the_reference():
    meta, tensors = golden("dar_registers")
    cfg = meta["settings"]["backbone_cfg"]
    sizes = {name: cfg[name] for name in ("embed_dim", "depth", "num_heads", "img_size")}
    vit = timm.create_model(
        "vit_small_patch14_reg4_dinov2", patch_size=cfg["patch_size"], num_classes=0, **sizes
    )
    model = td.wrap(vit, reduce=td.DAR(target_ratio=0.5), adapt=td.DARAdapter(dims=(12, 8)))
    td.load_reference(model, split(tensors, "weight.") | split(tensors, "extra."), system="dar")
    outcome = model.eval().forward_pass(tensors["input"])
    masks = torch.stack([tokens.selected for tokens in outcome.tokens], dim=1)
    assert masks[..., :5].all()
    assert torch.equal(masks[..., 5:], tensors["output.eval.token_select"].squeeze(-1))
    close = {"atol": 2e-4, "rtol": 0}
    expected = split(tensors, "output.eval.")
    torch.testing.assert_close(outcome.tokens[-1].x, expected["x_prenorm"], **close)
    torch.testing.assert_close(outcome.features[:, 1:5], expected["x_norm_regtokens"], **close)
    torch.testing.assert_close(outcome.features[:, 5:], expected["x_norm_patchtokens"], **close)


def test_training_equals_the_reference(monkeypatch):
    tensors, model = reference_backbone()
    replay_noise(monkeypatch, tensors["input.train.logistic_noise"])
    outcome = model.train().forward_pass(tensors["input"])
    masks = torch.stack([tokens.selected[:, 1:] for tokens in outcome.tokens], dim=1)
    assert torch.equal(masks.round(), tensors["output.train.token_select"].squeeze(-1).round())
    expected = tensors["output.train.x_norm_patchtokens"]
    torch.testing.assert_close(outcome.features[:, 1:], expected, atol=2e-4, rtol=0)


def position_cases():
    return golden("dar_pos_embed")[0]["settings"]["cases"]


@pytest.mark.parametrize("case", position_cases(), ids=lambda case: case["key"])
def test_positions_are_resized_as_in_the_reference(case):
    _, tensors = golden("dar_pos_embed")
    grid = (case["grid_h"], case["grid_w"])
    resized = resize_positions(tensors["input.pos_embed"], grid, offset=case["offset"])
    torch.testing.assert_close(resized, tensors[case["key"]], atol=1e-5, rtol=0)


def test_the_rate_loss_equals_the_reference():
    _, tensors = golden("dar_losses")
    loss = 2.0 * ada_loss(tensors["input.token_select"].squeeze(-1), 0.5)
    torch.testing.assert_close(loss, tensors["output.tokenreg_loss_adaloss"], rtol=1e-5, atol=0)


def test_blocks_have_the_published_size():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch14_dinov2", img_size=518)
        model = td.wrap(vit, reduce=td.DAR(), adapt=td.DARAdapter())
    assert model.cost().trainable_params == 12 * 195_722


def test_any_shape_of_the_grid_is_run():
    model = td.wrap(tiny_vit(dynamic_img_size=True), reduce=td.DAR(), adapt=td.DARAdapter())
    assert model.eval().feature_map(images(2, 32, 20)).shape == (2, 48, 8, 5)


def test_the_adapter_needs_a_complete_grid(vit):
    with pytest.raises(ValueError, match="DARAdapter needs the tokens of all .* but ToMe takes"):
        td.wrap(vit, reduce=td.ToMe(r=4), adapt=td.DARAdapter(dims=(6, 4)))


def test_losses_name_the_share(vit):
    model = td.wrap(vit, reduce=td.DAR(target_ratio=0.25)).train()
    student = model.forward_pass(images())
    losses = model.reducer.losses(td.passes.TrainingPasses(student, None, None, torch.sum))
    share = torch.stack([t.selected[:, 1:] for t in student.tokens], 1).mean((1, 2))
    torch.testing.assert_close(losses["rate"], 2 * F.mse_loss(share, torch.full((2,), 0.25)))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((72,), r"dims must be two widths \(adapter, compensator\), got \(72,\)"),
        ((72, 0), "dim must be an integer of at least 1, got 0"),
    ],
)
def test_bad_widths_raise(dims, message):
    with pytest.raises(ValueError, match=message):
        td.DARAdapter(dims=dims)
