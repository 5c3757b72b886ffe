import pytest
import torch
import torch.nn.functional as F
from examples import golden, images, replay_noise, split, tiny_vit

import tokendial as td
from tokendial.reduce.dyt import rate_loss


def reference_model(**settings):
    meta, tensors = golden("dyt_vit")
    sizes = {k: v for k, v in meta["settings"]["model"].items() if k != "mlp_ratio"}
    adapt = td.AdaptFormer(dim=meta["settings"]["ffn_num"], scale=0.1)
    model = td.wrap(tiny_vit(**sizes), reduce=td.DyT(target_ratio=0.5, **settings), adapt=adapt)
    state = split(tensors, "weight.") | split(tensors, "extra.")
    td.load_reference(model, state, system="dyt")
    return tensors, model


@torch.no_grad()
def test_inference_equals_the_reference():
    tensors, model = reference_model()
    model.eval()
    student = model.forward_pass(tensors["input"])
    masks = torch.stack([tokens.selected[:, 1:] for tokens in student.tokens], dim=1)
    assert torch.equal(masks, tensors["output.eval.token_select"].squeeze(-1))
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(student.logits, tensors["output.eval.logits"], **close)
    expected = tensors["output.eval.final_tokens"]
    features = student.features if _is_normed(expected, student) else student.tokens[-1].x
    torch.testing.assert_close(features, expected, **close)
    model.set_degree(0)
    torch.testing.assert_close(
        model(tensors["input"]), tensors["output.eval_complete.logits"], **close
    )


def _is_normed(expected, student):
    return (expected - student.features).abs().max() < (expected - student.tokens[-1].x).abs().max()


def test_training_equals_the_reference(monkeypatch):
    tensors, model = reference_model()
    model.train()
    replay_noise(monkeypatch, tensors["input.train.logistic_noise"])
    student = model.forward_pass(tensors["input"])
    masks = torch.stack([tokens.selected[:, 1:] for tokens in student.tokens], dim=1)
    assert torch.equal(masks.round(), tensors["output.train.token_select"].squeeze(-1).round())
    torch.testing.assert_close(student.logits, tensors["output.train.logits"], atol=1e-4, rtol=0)
    model.set_degree(0)
    complete = model.forward_pass(tensors["input"])

    def task_loss(logits):
        return F.cross_entropy(logits, tensors["input.labels"])

    losses = model.reducer.losses(td.passes.TrainingPasses(student, complete, None, task_loss))
    expected = split(tensors, "output.train.loss.")
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(losses["rate"], expected["token_weighted"], **close)
    torch.testing.assert_close(losses["complete"], expected["complete_ce"], **close)
    torch.testing.assert_close(losses["distilled"], expected["complete_kl"], **close)
    total = task_loss(student.logits) + sum(losses.values())
    torch.testing.assert_close(total, expected["total"], **close)
    total.backward()
    for name, value in split(tensors, "output.train.grad.").items():
        ours = (
            model.vit.get_parameter(name)
            if name.startswith("head")
            else dict(model.named_parameters())[td.reference.wrapped_name(name, "dyt")]
        )
        torch.testing.assert_close(ours.grad, value, rtol=1e-3, atol=1e-6)


def rows():
    return golden("dyt_rate_loss")[0]["settings"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["key"])
def test_the_rate_loss_equals_the_reference(row):
    _, tensors = golden("dyt_rate_loss")
    selected = tensors["input.token_select"].squeeze(-1)
    loss = rate_loss(
        selected,
        row["target"],
        minimal=row["minimal"],
        minimal_weight=row["minimal_weight"],
    )
    torch.testing.assert_close(loss, tensors[row["key"]], rtol=1e-5, atol=0)


def test_topk_processes_exactly_the_share_of_the_dial():
    model = td.wrap(tiny_vit(), reduce=td.DyT(target_ratio=0.5, selection="topk")).eval()
    for degree, share in ((5, 0.5), (7, 0.3)):
        model.set_degree(degree)
        for tokens in model.forward_pass(images()).tokens:
            assert tokens.selected[:, 1:].sum(1).tolist() == [-(-64 * share // 1)] * 2


def test_the_nominal_cost_is_that_of_the_target():
    # 12 layers of ViT-B at half the FFN, with the adapter: 12.26 G by the paper's count.
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        model = td.wrap(vit, reduce=td.DyT(), adapt=td.AdaptFormer(dim=64, scale=0.1))
    assert model.cost().gmacs == pytest.approx(12.26, rel=0.01)


def test_a_floor_under_the_decisions_adds_to_the_loss(vit):
    plain = td.wrap(vit, reduce=td.DyT(complete=False)).train()
    floored = td.wrap(vit, reduce=td.DyT(complete=False, minimal_ratio=0.5)).train()
    floored.reducer.load_state_dict(plain.reducer.state_dict())

    def rate(model):
        torch.manual_seed(0)
        student = model.forward_pass(images())
        return model.reducer.losses(td.passes.TrainingPasses(student, None, None, torch.sum))

    assert list(rate(plain)) == ["rate"]
    assert rate(floored)["rate"] > rate(plain)["rate"]


def test_losses_at_degree_0_raise(vit):
    model = td.wrap(vit, reduce=td.DyT()).train()
    model.set_degree(0)
    with pytest.raises(
        ValueError,
        match="degree must be at least 1 in training, so that tokens are selected; got 0",
    ):
        model.reducer.losses(
            td.passes.TrainingPasses(model.forward_pass(images()), None, None, torch.sum)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_ratio": 1.5}, r"target_ratio must be in \(0, 1\], got 1.5"),
        ({"selection": "best"}, "selection must be one of threshold, topk, got 'best'"),
        ({"ratio_weight": -2}, "ratio_weight must be a number of at least 0, got -2"),
        ({"minimal_ratio": 0}, r"minimal_ratio must be in \(0, 1\], got 0"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        td.DyT(**settings)
