"""Binary masks: losses and metrics equal the public implementations'."""

import pytest
import torch
import torch.nn.functional as F
from examples import golden, split

import tokendial as td
from tokendial.data import MaskAugment
from tokendial.data.readers.mask_files import IGNORED
from tokendial.runs.recipe import check_recipe
from tokendial.runs.run import task_of
from tokendial.tasks import BinaryMasks, FeatureDistillation
from tokendial.tasks.mask_losses import MASK_LOSSES, PUBLISHED
from tokendial.tasks.metrics import MaskMetrics

CASE, TENSORS = golden("sod_metrics")
NAMES = {
    "MAE": "mae",
    "WeightedFmeasure": "weighted_f",
    "Smeasure": "s_measure",
    "Emeasure_adaptive": "adaptive_e",
    "Emeasure_mean": "mean_e",
    "Emeasure_max": "max_e",
    "Fmeasure_adaptive": "adaptive_f",
    "Fmeasure_mean": "mean_f",
    "Fmeasure_max": "max_f",
}


def logits_of(grey):
    """Logits whose probabilities are the grey levels, up to rounding in float32."""
    return torch.logit(grey.double() / 255, eps=1e-9).float()


@pytest.mark.parametrize("number", range(12), ids=CASE["settings"]["map_names"])
def test_metrics_equal_pysodmetrics(number):
    metrics = MaskMetrics()
    metrics.update(
        logits_of(TENSORS["input.pred_uint8"][number])[None, None], TENSORS["input.gt"][[number]]
    )
    found = metrics.compute()
    assert set(found) == set(NAMES.values())
    for theirs, ours in NAMES.items():
        expected = TENSORS[f"output.pysodmetrics.{theirs}"][number]
        torch.testing.assert_close(found[ours], expected, atol=1e-4, rtol=0)


def test_metrics_are_means_over_images_whatever_the_batches_and_sizes():
    maps, masks = logits_of(TENSORS["input.pred_uint8"])[:, None], TENSORS["input.gt"]
    together, alone = MaskMetrics(), MaskMetrics()
    together.update(maps[:4], [mask.repeat(2, 3) for mask in masks[:4]])
    for number in range(4):
        alone.update(maps[[number]], masks[number].repeat(2, 3)[None])
    for name, value in together.compute().items():
        torch.testing.assert_close(value, alone.compute()[name])
    small = torch.stack([logits_of(TENSORS["input.pred_uint8"][0])[None]])
    resized = MaskMetrics()
    resized.update(small, [torch.zeros(1, 7), torch.ones(1, 7)][:1])
    assert 0 < resized.compute()["mae"] < 1


def dar_measures(logits, targets):
    metrics = BinaryMasks(MaskAugment(), measures="dar").metrics()
    metrics.update(logits, targets)
    return metrics.compute()


@pytest.mark.parametrize("number", range(12), ids=CASE["settings"]["map_names"])
def test_dars_measures_equal_those_of_its_code(number):
    logits = torch.logit(TENSORS["input.pred"][number].double())
    found = dar_measures(logits[None, None], TENSORS["input.gt"][[number]])
    assert set(found) == set(NAMES.values())
    for theirs, ours in NAMES.items():
        if CASE["settings"]["map_names"][number] in CASE["unstable"].get(
            f"output.dar.{theirs}", ()
        ):
            continue
        expected = TENSORS[f"output.dar.{theirs}"][number]
        torch.testing.assert_close(found[ours], expected, atol=1e-4, rtol=0, equal_nan=True)


def test_dars_measures_of_small_maps_are_means_over_images():
    logits = torch.logit(TENSORS["input.pred_lowres"].double())[:, None]
    found = dar_measures(logits, TENSORS["input.gt"])
    for theirs, ours in NAMES.items():
        expected = TENSORS[f"output.dar_lowres_dataset.{theirs}"]
        tolerance = 5e-3 if ours == "weighted_f" else 1e-4
        torch.testing.assert_close(found[ours], expected, atol=tolerance, rtol=0)


def test_ignored_pixels_change_none_of_dars_measures():
    logits, mask = logits_of(TENSORS["input.pred_uint8"])[:1, None], TENSORS["input.gt"][:1].long()
    mask[:, :8] = IGNORED
    first = dar_measures(logits, mask)
    logits[:, :, :8] = -logits[:, :, :8]
    assert first["mae"] > 0
    assert dar_measures(logits, mask) == first


def test_a_recipe_chooses_whose_measures():
    model = {"name": "vit_tiny_patch16_224", "weights": None}
    fields = {"model": model, "output": "runs/x", "adapt": {"name": "linear"}}
    masks = {"decode": {"name": "linear"}, "data": {"name": "scene_masks"}}
    recipe = check_recipe(fields | masks | {"mask_measures": "dar"})
    assert task_of(recipe, 1, multi_label=False, dense=True, video=False).measures == "dar"
    with pytest.raises(ValueError, match="mask_measures is for masks of one class, .* 3 classes"):
        task_of(recipe, 3, multi_label=False, dense=True, video=False)
    with pytest.raises(ValueError, match="mask_measures needs a decoder"):
        check_recipe(fields | {"data": {"name": "scenes"}, "mask_measures": "dar"})
    with pytest.raises(ValueError, match=r"mask_measures.*'pysodmetrics' or 'dar'"):
        check_recipe(fields | masks | {"mask_measures": "leaderboard"})


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"bce": 1.0}, ["mask_loss_bce"]),
        ({"dice": 0.5}, ["mask_loss_dice"]),
        ({"iou": 1.0}, ["IOULoss"]),
        ({"ual": 1.0}, ["UALLoss"]),
        ({"weighted_bce": 1.0}, ["WeightedBCEWithLogitsLoss"]),
        ({"weighted_bce": 1.0, "iou": 1.0}, ["WeightedBCEWithLogitsLoss", "IOULoss"]),
        (PUBLISHED, ["mask_loss_bce", "mask_loss_dice"]),
    ],
)
def test_losses_equal_the_reference(weights, expected):
    _, tensors = golden("dar_losses")
    loss = BinaryMasks(MaskAugment(), weights).loss(
        tensors["input.pred_logits"], tensors["input.label"].long()
    )
    wanted = sum(tensors[f"output.{name}"] for name in expected)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_ignored_pixels_change_no_loss(name):
    """The logits there do not count, whatever they are."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 12, 12, generator=generator)
    targets = (torch.rand(2, 12, 12, generator=generator) < 0.4).long()
    targets[:, :4] = IGNORED
    task = BinaryMasks(MaskAugment(), {name: 1.0})
    losses = []
    for there in (0.0, 7.0, -7.0):
        logits[:, :, :4] = there
        losses.append(task.loss(logits, targets))
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    assert task.loss(logits, torch.full_like(targets, IGNORED)).isfinite()


def test_a_recipe_names_its_losses():
    model = {"name": "vit_tiny_patch16_224", "weights": None}
    fields = {"model": model, "output": "runs/x", "adapt": {"name": "linear"}}
    fields["mask_losses"] = {"weighted_bce": 1, "iou": 1}
    masks = {"decode": {"name": "linear"}, "data": {"name": "scene_masks"}}
    recipe = check_recipe(fields | masks)
    task = task_of(recipe, 1, multi_label=False, dense=True, video=False)
    assert task.losses == {"weighted_bce": 1.0, "iou": 1.0}
    with pytest.raises(ValueError, match="mask_losses is for masks of one class, .* 3 classes"):
        task_of(recipe, 3, multi_label=False, dense=True, video=False)
    with pytest.raises(ValueError, match="mask_losses needs a decoder"):
        check_recipe(fields | {"data": {"name": "scenes"}})
    with pytest.raises(ValueError, match=r"mask_losses.*'bce', 'weighted_bce', 'dice', 'iou' or"):
        check_recipe(fields | masks | {"mask_losses": {"focal": 1}})
    with pytest.raises(ValueError, match="mask_losses"):
        check_recipe(fields | masks | {"mask_losses": {"bce": 0}})


def test_the_distillation_loss_equals_the_reference():
    _, tensors = golden("dar_losses")
    heads = FeatureDistillation(12)
    heads.student, heads.teacher = torch.nn.Identity(), torch.nn.Identity()
    maps = [tensors[name].mT.unflatten(2, (4, 4)) for name in ("input.rec", "input.rec_target")]
    expected = tensors["output.d_reg_loss_cosloss"]
    torch.testing.assert_close(0.1 * heads(*maps), expected, rtol=1e-5, atol=0)


def test_gradients_into_the_teachers_head_can_be_stopped():
    for detach in (False, True):
        heads = FeatureDistillation(6, 4, detach=detach)
        heads(torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)).backward()
        assert (heads.teacher[0].weight.grad is None) == detach
        assert heads.student[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inside", [0, 1])
def test_empty_and_full_masks_have_finite_losses_and_metrics(inside):
    task = BinaryMasks(MaskAugment())
    targets = torch.full((2, 9, 11), inside)
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    task.loss(logits, targets).backward()
    assert logits.grad.isfinite().all()
    metrics = task.metrics()
    metrics.update(logits.detach(), targets)
    assert all(torch.isfinite(value) for value in metrics.compute().values())
    assert task.batch_score(torch.full((2, 1, 4, 4), 9.0), targets) == inside


def test_the_loss_leaves_out_ignored_pixels():
    """Gradients are 0 at ignored pixels, and elsewhere as if only the other pixels existed."""
    torch.manual_seed(0)
    task = BinaryMasks(MaskAugment())
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    targets = torch.randint(2, (2, 8, 8))
    targets[..., 5:] = 255
    loss = task.loss(logits, targets)
    kept = task.loss(logits[..., :5], targets[..., :5])
    torch.testing.assert_close(loss, kept)
    loss.backward()
    assert logits.grad[..., 5:].abs().sum() == 0
    assert logits.grad[..., :5].abs().min() > 0
    right = torch.where(targets == 1, 9.0, -9.0)[:, None]
    assert task.batch_score(right, targets) == 1.0
    assert task.loss(logits, torch.full((2, 8, 8), 255)) == 0


def test_metrics_leave_out_ignored_pixels():
    """Metrics that do not depend on positions equal those of the other pixels alone."""
    maps, masks = logits_of(TENSORS["input.pred_uint8"])[:4, None], TENSORS["input.gt"][:4].long()
    columns = masks.shape[-1] * 2 // 3
    void = masks.clone()
    void[..., columns:] = 255
    part, ignored, other, none = (MaskMetrics() for _ in range(4))
    part.update(maps[..., :columns], masks[..., :columns])
    ignored.update(maps, void)
    changed = maps.clone()
    changed[..., columns:] = 3.0
    other.update(changed, void)
    expected, found = part.compute(), ignored.compute()
    for name in ("mae", "max_f", "mean_f", "adaptive_f", "max_e", "mean_e", "adaptive_e"):
        torch.testing.assert_close(found[name], expected[name], msg=name)
    for name, value in other.compute().items():
        torch.testing.assert_close(value, found[name], msg=name)
    none.update(maps, torch.full_like(void, 255))
    assert none.count == 0


def replay(monkeypatch, noise):
    layers = iter(noise.squeeze(-1).unbind(1))
    monkeypatch.setattr("tokendial.reduce.select.logistic_noise", lambda like: next(layers))


@pytest.mark.parametrize("case", ["dar_seg", "dar_seg_distill"])
def test_a_training_step_equals_the_reference(monkeypatch, case):
    """Losses, the gradient of every parameter, and the statistics of BatchNorm."""
    from decode.test_decoders import reference_model

    from tokendial.train.objective import Distillation, Objective

    tensors, model, state = reference_model(case)
    td.load_reference(model, state, "dar")
    task, distillation = BinaryMasks(MaskAugment()), None
    if case == "dar_seg_distill":
        heads = FeatureDistillation(48, 32)
        own = {
            name.replace(f"d_head_{short}.mlp", long): value
            for short, long in (("s", "student"), ("t", "teacher"))
            for name, value in state.items()
            if name.startswith(f"d_head_{short}.")
        }
        heads.load_state_dict(own)
        _, teacher, _ = reference_model(case)
        teacher.vit.load_state_dict(split(tensors, "weight.backbone."))
        distillation = Distillation(heads, td.wrap(teacher.vit), 0.1)
    replay(monkeypatch, tensors["input.train.logistic_noise"])
    objective = Objective(model, task, None, distillation).train()
    loss, logits = objective(tensors["input"], tensors["input.label_mask"].squeeze(1).long())
    expected = tensors["output.train.pred_mask"]
    torch.testing.assert_close(logits.sigmoid(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, tensors["output.train.loss.total"], rtol=1e-5, atol=0)
    loss.backward()
    parameters = dict(model.named_parameters())
    if distillation:
        for short, long in (("s", "student"), ("t", "teacher")):
            parameters |= {
                f"vit.d_head_{short}.mlp.{name}": parameter
                for name, parameter in getattr(distillation.heads, long).named_parameters()
            }
    gradients = split(tensors, "output.train.grad.")
    assert len(gradients) == sum(p.requires_grad for p in objective.parameters())
    for name, expected in gradients.items():
        ours = parameters[td.reference.wrapped_name(name, "dar")].grad
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3)
    buffers = model.state_dict()
    for name, expected in split(tensors, "output.train.after.").items():
        torch.testing.assert_close(buffers[td.reference.wrapped_name(name, "dar")], expected)


def test_probabilities_are_resized_not_logits():
    """Resize as the reference does for its metrics."""
    tensors = golden("dar_seg")[1]
    logits, masks = tensors["output.eval.logits_mask"], tensors["input.label_mask"].squeeze(1)
    metrics = MaskMetrics()
    metrics.update(logits, masks)
    sized = tensors["output.eval.prob_at_label_size"]
    expected = ((sized * 255).round() / 255).squeeze(1)
    low, high = expected.amin((1, 2), True), expected.amax((1, 2), True)
    error = F.l1_loss((expected - low) / (high - low), masks)
    torch.testing.assert_close(metrics.compute()["mae"], error, atol=1e-3, rtol=0)
