import pytest
import torch
from examples import golden, split, tiny_vit

import tokendial as td


@pytest.mark.parametrize(
    ("system", "reduce"), [("tome", td.ToMe(r=8)), ("evit", td.EViT(layers=(2, 4)))]
)
@torch.no_grad()
def test_a_checkpoint_of_a_system_without_own_weights_is_loaded(system, reduce):
    meta, tensors = golden(f"{system}_vit")
    model = td.wrap(tiny_vit(**meta["settings"]["model"]), reduce=reduce)
    # Checkpoints of training hold the weights under "model", beside other things.
    td.load_reference(model, {"model": split(tensors, "weight."), "epoch": 30}, system)
    assert torch.equal(model.vit.head.weight, tensors["weight.head.weight"])


def dyt_model():
    meta, tensors = golden("dyt_vit")
    sizes = {k: v for k, v in meta["settings"]["model"].items() if k != "mlp_ratio"}
    model = td.wrap(tiny_vit(**sizes), reduce=td.DyT(), adapt=td.AdaptFormer(dim=8))
    return model, split(tensors, "weight.") | split(tensors, "extra.")


def test_all_wrong_names_are_in_one_line_and_the_model_is_left_alone():
    model, state = dyt_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del state["blocks.0.adaptmlp.down_proj.weight"], state["norm.bias"]
    state["blocks.0.router.weight"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(99)
    with pytest.raises(ValueError, match="this is not a dyt state dict of this model") as raised:
        td.load_reference(model, state, system="dyt")
    message = str(raised.value)
    assert "missing: vit.norm.bias, adapter.down.0.weight;" in message
    assert "unexpected: vit.blocks.0.router.weight;" in message
    assert "of another shape: vit.head.bias." in message
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_many_wrong_names_are_counted():
    model, _ = dyt_model()
    with pytest.raises(ValueError, match=r"missing: (\S+, ){4}\S+ and \d+ more\.$"):
        td.load_reference(model, {}, system="dyt")


def test_an_unknown_system_raises(vit):
    with pytest.raises(ValueError, match="system must be one of tome, .*, got 'ats'"):
        td.load_reference(td.wrap(vit), {}, system="ats")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((7,), torch.nan), "head.bias must hold finite numbers, got NaN"),
        (torch.ones(7).int(), "head.bias must be of a float type, got torch.int32"),
        (None, "head.bias must be a dense tensor, got NoneType"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(value, message):
    model, state = dyt_model()
    with pytest.raises(ValueError, match=f"this dyt state dict: vit.{message}"):
        td.load_reference(model, state | {"head.bias": value}, system="dyt")


def test_a_pair_of_tocom_without_a_place_is_refused_and_other_tensors_are_named(caplog):
    _, tensors = golden("tocom_vit")
    pairs = split(tensors, "extra.")
    td.Compensator.from_reference(pairs | {"norm.bias": torch.ones(1)})
    assert "left out: 1 norm" in caplog.text
    odd = {"blocks.0.attn.k_tocom.adapter_up.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="blocks.0.attn.k_tocom.adapter_up.weight has no place"):
        td.Compensator.from_reference(pairs | odd)
    name = next(iter(pairs))
    with pytest.raises(ValueError, match=f"{name} must hold finite numbers, got infinity"):
        td.Compensator.from_reference(pairs | {name: pairs[name] / 0})


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_compensator_is_attached_to_a_model_fine_tuned_at_degree_0(whole):
    meta, tensors = golden("tocom_vit")
    vit = tiny_vit()
    weights = split(tensors, "weight.")
    if not whole:
        vit.load_state_dict(weights)
    model = td.wrap(vit, reduce=td.ToMe(r=0)).eval()
    td.load_reference(model, split(tensors, "extra.") | (weights if whole else {}), "tocom")
    model.compensation.compensator.scale = meta["settings"]["tocom_scale"]
    model.set_degree(8)
    torch.testing.assert_close(
        model(tensors["input"]), tensors["output.t8_s0.logits"], atol=1e-4, rtol=0
    )
