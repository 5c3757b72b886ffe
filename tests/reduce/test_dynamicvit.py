import pytest
import torch
import torch.nn.functional as F
from examples import golden, images, split, tiny_vit

import tokendial as td
from tokendial.attention import attend, masked_softmax
from tokendial.backbones import anatomy_of
from tokendial.passes import TrainingPasses


def policy_case():
    _, tensors = golden("dynamicvit_policy_softmax")
    return tensors, tensors["input.policy"].squeeze(-1)


def test_the_masked_softmax_equals_the_reference():
    tensors, policy = policy_case()
    weights = masked_softmax(tensors["input.attn_logits"], policy)
    torch.testing.assert_close(weights, tensors["output.softmax_with_policy"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_a_masked_attention_layer_equals_the_reference(masked):
    tensors, policy = policy_case()
    weights = split(tensors, "weight.")
    qkv = F.linear(tensors["input.x"], weights["qkv.weight"])
    q, k, v = qkv.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    out = attend(q, k, v, policy_BN=policy if masked else None)[0]
    out = F.linear(out, weights["proj.weight"], weights["proj.bias"])
    expected = tensors[f"output.attention_{'with' if masked else 'without'}_policy"]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def reference_model(keep_rate=0.7, **settings):
    meta, tensors = golden("dynamicvit_vit")
    sizes = {k: v for k, v in meta["settings"]["model"].items() if k != "mlp_ratio"}
    vit = tiny_vit(**sizes)
    model = td.wrap(vit, reduce=td.DynamicViT(keep_rate=keep_rate, layers=(2, 3, 4), **settings))
    state = split(tensors, "weight.") | split(tensors, "extra.")
    td.load_reference(model, state, system="dynamicvit")
    return tensors, model


@pytest.mark.parametrize("keep_rate", [0.7, [0.7, 0.49, 0.343]])
@torch.no_grad()
def test_inference_equals_the_reference(keep_rate):
    tensors, model = reference_model(keep_rate)
    model.eval()
    steps = list(model.steps(tensors["input"], track=True))
    counts = [step.tokens.x.shape[1] for step in steps]
    assert counts == tensors["output.eval.tokens_per_layer"].tolist()
    torch.testing.assert_close(
        model(tensors["input"]), tensors["output.eval.logits"], atol=1e-4, rtol=0
    )
    # Patches left after the last step: the reference numbers them within those kept before.
    kept = tensors["output.eval.stage0.kept_idx"]
    for stage in (1, 2):
        kept = kept.gather(1, tensors[f"output.eval.stage{stage}.kept_idx"])
    left = (steps[-1].tokens.origin[:, 1:] >= 0).nonzero()[:, 1].reshape(2, -1)
    assert torch.equal(left, kept.sort().values)


def train_pass(model, tensors, monkeypatch):
    """The student's pass in training, with the recorded noise."""
    noise = [tensors[f"input.train.stage{stage}.gumbel"] for stage in range(3)]

    def replay(scores, hard):
        soft = (scores + noise.pop(0)).softmax(-1)
        decided = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
        return decided - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", replay)
    return model.train().forward_pass(tensors["input"])


def losses_of(model, tensors, student):
    teacher = td.passes.ForwardPass(
        0,
        tensors["input.teacher_logits"],
        F.pad(tensors["input.teacher_tokens"], (0, 0, 1, 0)),
        [],
    )
    return model.reducer.losses(td.passes.TrainingPasses(student, None, teacher, torch.sum))


def test_training_equals_the_reference(monkeypatch):
    tensors, model = reference_model()
    student = train_pass(model, tensors, monkeypatch)
    for stage, layer in enumerate((2, 3, 4)):
        decision = student.tokens[layer - 1].policy[:, 1:]
        assert torch.equal(decision.round(), tensors[f"output.train.stage{stage}.keep_decision"])
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(student.logits, tensors["output.train.logits"], **close)
    torch.testing.assert_close(student.features[:, 1:], tensors["output.train.features"], **close)


@pytest.mark.parametrize("kind", ["default", "mse"])
def test_losses_equal_the_reference(kind, monkeypatch):
    token_loss = {"default": "kl", "mse": "mse"}[kind]
    tensors, model = reference_model(token_loss=token_loss)
    losses = losses_of(model, tensors, train_pass(model, tensors, monkeypatch))
    expected = split(tensors, f"output.train.loss.{kind}.")
    close = {"rtol": 1e-4, "atol": 0}
    # The reference prints the sum over the three steps, and adds their mean to the total.
    torch.testing.assert_close(losses["ratio"], 2.0 * expected["ratio"] / 3, **close)
    torch.testing.assert_close(losses["distilled_logits"], 0.5 * expected["cls_kl"], **close)
    torch.testing.assert_close(losses["distilled_tokens"], 0.5 * expected["token_kl"], **close)
    if kind == "mse":
        total = expected["cls"] + sum(losses.values())
        torch.testing.assert_close(total, expected["total"], **close)


def test_the_ratio_loss_over_the_batch_lets_images_differ(monkeypatch):
    """Of one image both losses are the same; of several, the mean of squares is the larger one."""
    losses = {}
    for over in ("image", "batch"):
        tensors, model = reference_model(ratio_over=over, keep_rate=[0.7, 0.5, 0.3])
        student = train_pass(model, tensors, monkeypatch)
        losses[over] = losses_of(model, tensors, student)["ratio"].item()
        kept = [student.tokens[layer - 1].policy[:, 1:].mean(1) for layer in (2, 3, 4)]
    shares = [each - rate for each, rate in zip(kept, (0.7, 0.5, 0.3), strict=True)]
    by_batch = torch.stack([each.mean() for each in shares]).square().mean()
    assert losses["batch"] == pytest.approx(2.0 * by_batch.item(), rel=1e-4)
    assert losses["image"] > losses["batch"]


def test_gradients_of_the_predictors_equal_the_reference(monkeypatch):
    tensors, model = reference_model(token_loss="mse")
    student = train_pass(model, tensors, monkeypatch)
    task = F.cross_entropy(student.logits, tensors["input.labels"])
    (task + sum(losses_of(model, tensors, student).values())).backward()
    expected = split(tensors, "output.train.grad.score_predictor.")
    for name, value in expected.items():
        name = name.replace("in_conv", "inside").replace("out_conv", "outside")
        gradient = model.reducer.predictors.get_parameter(name).grad
        torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-7)


def test_listed_shares_are_off_or_on():
    model = td.wrap(tiny_vit(), reduce=td.DynamicViT(keep_rate=[0.75, 0.25], layers=(2, 4)))
    assert (model.degrees, model.degree) == ((0, 1), 1)
    assert model.cost().tokens_per_layer == (65, 49, 49, 17)
    for wrong in ([0.5], [0.2, 0.5], [1.2, 0.5]):
        with pytest.raises(ValueError, match="keep_rate must"):
            td.DynamicViT(keep_rate=wrong, layers=(2, 4))


def test_counts_follow_the_dial_and_the_image():
    model = td.wrap(tiny_vit(), reduce=td.DynamicViT(keep_rate=0.5, layers=(2, 4)))
    assert model.degree == 5
    assert model.cost().tokens_per_layer == (65, 33, 33, 17)
    assert model.cost(0).tokens_per_layer == (65, 65, 65, 65)
    wide = td.wrap(tiny_vit(dynamic_img_size=True), reduce=td.DynamicViT(layers=(2,))).eval()
    assert list(wide.steps(images(1, 32, 16)))[-1].tokens.x.shape[1] == 1 + int(32 * 0.7)


def test_the_predictors_have_the_published_size():
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
        model = td.wrap(vit, reduce=td.DynamicViT())
    assert sum(p.numel() for p in model.reducer.parameters()) == 3 * 961_730


def test_without_a_teacher_only_the_ratio_is_trained(vit):
    model = td.wrap(vit, reduce=td.DynamicViT(layers=(2,))).train()
    student = model.forward_pass(images())
    losses = model.reducer.losses(td.passes.TrainingPasses(student, None, None, torch.sum))
    assert list(losses) == ["ratio"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (4, 2)}, "layers must rise, got"),
        ({"keep_rate": 0}, r"keep_rate must be in \(0, 1\], got 0"),
        ({"token_loss": "l1"}, "token_loss must be one of mse, kl, got 'l1'"),
        ({"ratio_weight": -1}, "ratio_weight must be a number of at least 0, got -1"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        td.DynamicViT(**settings)


def test_attention_with_a_policy_of_ones_is_nearly_plain_attention(vit):
    anatomy = anatomy_of(vit)
    tokens = anatomy.embed(images())
    q, k, v = anatomy.qkv(1, anatomy.attention_input(1, tokens.x), tokens)
    masked, _ = attend(q, k, v, policy_BN=torch.ones(2, 65))
    torch.testing.assert_close(masked, attend(q, k, v)[0], atol=1e-5, rtol=0)


def test_an_image_that_keeps_no_patch_trains_like_others():
    model = td.wrap(tiny_vit(), reduce=td.DynamicViT(layers=(2, 4))).train()
    for predictor in model.reducer.predictors:
        # Log-probabilities of keeping and dropping so far apart that no noise matters.
        predictor.outside[4].bias.data = torch.tensor([-1e4, 1e4])
    outcome = model.forward_pass(images())
    assert outcome.tokens[-1].policy.sum() == 2  # the class tokens
    loss = sum(model.reducer.losses(TrainingPasses(outcome, None, None, torch.sum)).values())
    (outcome.logits.sum() + loss).backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
