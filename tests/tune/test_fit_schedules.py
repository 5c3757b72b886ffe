"""Fitting a model: it is left alone, and keeps to budgets that can be counted."""

import copy
import re

import pytest
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td
from tokendial.tune import FitResult
from tokendial.tune.agreement import binary_logits, compare_logits, compare_masks
from tokendial.tune.fit_result import FitPoint, FittedDegree


@pytest.mark.parametrize(
    "reduce",
    [
        td.ToMe(sizes="similarity"),
        td.EViT(rest="drop", score="shift"),
        td.EViT(score="mean"),
        td.PiToMe(),
        td.PruneMerge(),
    ],
)
@torch.no_grad()
def test_counted_budgets_are_kept_and_become_degrees(reduce):
    model = td.wrap(tiny_vit(depth=3), reduce=td.ToMe(r=3), adapt=td.AdaptFormer(dim=4)).train()
    before = (model.reducer, model.degree, model.training)
    whole = model.cost(0).gmacs
    fitted = td.fit(
        model, images(12), gmacs=(0.7 * whole, 0.5 * whole), reduce=reduce, minutes=0.05
    )
    assert (model.reducer, model.degree, model.training) == before
    assert fitted.unit == "GMACs"
    assert fitted.unreduced == pytest.approx(whole)
    vit = copy.deepcopy(model.vit)
    dial = td.wrap(vit, reduce=fitted.reduce, adapt=td.AdaptFormer(dim=4)).eval()
    for row in fitted.degrees:
        assert dial.cost(row.degree).gmacs <= row.budget
        assert row.found.cost == pytest.approx(dial.cost(row.degree).gmacs / whole)
        assert row.found.divergence <= row.constant.divergence
    mild, hard = fitted.degrees
    assert (mild.degree, hard.degree) == (1, 2)
    assert mild.found.divergence <= hard.found.divergence
    costs = [point.cost for point in fitted.frontier]
    divergences = [point.divergence for point in fitted.frontier]
    assert costs == sorted(costs)
    assert divergences == sorted(divergences, reverse=True)


@torch.no_grad()
def test_budgets_of_a_model_in_half_precision_are_counted():
    model = td.wrap(tiny_vit(depth=2)).eval().bfloat16()
    fitted = td.fit(model, images(8), gmacs=0.7 * model.cost().gmacs, minutes=0.05)
    assert td.wrap(model.vit, reduce=fitted.reduce).cost(1).gmacs <= fitted.degrees[0].budget


@torch.no_grad()
def test_other_images_decide_between_the_best_schedules():
    """What the search likes best on its own eight images is not the best on the others here."""
    model = td.wrap(tiny_vit(depth=3)).eval()
    seen = torch.cat([images(8), 3 * images(32).flip(1) + 1])
    fitted = td.fit(model, seen, gmacs=0.6 * model.cost().gmacs, minutes=0.05)
    (found,) = (degree.found for degree in fitted.degrees)
    others = seen[fitted.images :][: fitted.images_judged]

    def divergence(removed):
        reduced = td.wrap(model.vit, reduce=td.ToMe(r=list(removed))).eval()
        p, q = model(others).log_softmax(-1), reduced(others).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    allowed = [point for point in fitted.searched if point.cost <= found.cost]
    favourite = min(allowed, key=lambda point: point.divergence)
    assert favourite.removed != found.removed
    assert found.divergence == pytest.approx(divergence(found.removed), rel=1e-3)
    assert found.divergence < divergence(favourite.removed)


@torch.no_grad()
def test_the_schedules_of_the_method_are_compared_too():
    model = td.wrap(tiny_vit(depth=3)).eval()
    start = td.ToMe(r=[[0.0, 0.5, 0.0]])
    settings = {"gmacs": 0.8 * model.cost().gmacs, "minutes": 0.05}
    fitted = td.fit(model, images(8), reduce=start, **settings)
    # Scaled to the budget, only the second layer removes tokens.
    removed = max(
        (point.removed for point in fitted.searched if not point.removed[0] + point.removed[2]),
        key=sum,
    )
    others = {point.removed for point in td.fit(model, images(8), **settings).searched}
    assert removed[1] > 1
    assert removed not in others


@torch.no_grad()
def test_a_learnt_metric_is_fitted_with_its_weights(tmp_path):
    method = td.LearntMetric(r=2, dim=4)
    model = perturbed(td.wrap(tiny_vit(depth=3), reduce=method)).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    seen = images(40)
    fitted = td.fit(model, seen, gmacs=0.7 * model.cost(0).gmacs, minutes=0.05)
    assert (model.reduce_config, model.degree) == (method, 2)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    (degree,) = fitted.degrees
    schedules = td.LearntMetric(r=[list(degree.found.removed)], dim=4)
    assert fitted.reduce == schedules
    model.save_pretrained(tmp_path)
    again = td.load(tmp_path, tiny_vit(depth=3), reduce=schedules)
    others = seen[fitted.images :][: fitted.images_judged]
    model.set_degree(0)
    p, q = model(others).log_softmax(-1), again(others).log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert degree.found.divergence == pytest.approx(divergence, rel=1e-3)
    for own, other, message in (
        (method, td.ToMe(), "reduce must be the model's own LearntMetric.*, got ToMe"),
        (method, td.LearntMetric(), "own LearntMetric.*dim=4.*, got LearntMetric.*dim=64"),
        (td.ToMe(), method, "LearntMetric has weights, so the model has to be trained with it"),
    ):
        with pytest.raises(ValueError, match=message):
            td.fit(td.wrap(tiny_vit(depth=3), reduce=own), seen, gmacs=0.01, reduce=other)


def vit_that_reads_no_dark_patch():
    """Nothing attends to patches whose third colour is dark, so dropping them changes nothing."""
    vit = tiny_vit(depth=3)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.cls_token[..., 0] = 0
        weight = vit.patch_embed.proj.weight
        weight[0], weight[:, 2], weight[0, 2] = 0, 0, 1 / 16
        for block in vit.blocks:
            query, key, _ = block.attn.qkv.weight.chunk(3)
            query.zero_()
            key.zero_()[:, 0] = 5
            block.attn.qkv.bias[:48], block.attn.qkv.bias[48:96] = 1, 0
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight[0], linear.bias[0] = 0, 0
    return vit


def twins():
    """Each patch on the left has a twin on the right that is as bright, but dark in one colour."""
    left = images(8)[..., :16]
    left[:, 2] = 0.25
    return torch.cat([left, left * torch.tensor([1.0, 1.0, -1.0]).view(3, 1, 1)], dim=-1)


def halves():
    """Each half has one colour, so its tokens are alike and merging them loses nothing."""
    return 3 * images(8)[..., :1, :2].repeat_interleave(16, dim=-1).expand(-1, -1, 32, -1)


def vit_without_positions():
    vit = tiny_vit(depth=3)
    with torch.no_grad():
        vit.pos_embed.zero_()
    return vit


def vit_without_attention():
    vit = tiny_vit(depth=3)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.proj.weight.zero_()
    return vit


@pytest.mark.parametrize(
    ("vit", "seen", "given", "best"),
    [
        (vit_that_reads_no_dark_patch(), twins(), {}, 1.0),
        (vit_without_positions(), halves(), {}, 0.0),
        (vit_without_attention(), images(8), {"r": [2, 4], "pruned": [2, 1]}, [1.0, 0.25, 0.5]),
    ],
    ids=["dropping is free", "merging is free", "all are free"],
)
@torch.no_grad()
def test_the_share_that_is_dropped_is_found_or_kept(vit, seen, given, best):
    model = td.wrap(vit).eval()
    method = td.PruneMerge(**given)
    notes = []
    budget = 0.85 * model.cost().gmacs
    fitted = td.fit(model, seen, gmacs=budget, reduce=method, minutes=0.02, note=notes.append)
    assert fitted.to_json()["reduce"]["prune_share"] == best
    assert any("best: " + ("as given" if given else f"prune_share {best:g}") in n for n in notes)
    (degree,) = fitted.degrees
    assert degree.found.divergence == pytest.approx(0.0, abs=1e-5)
    dial = td.wrap(vit, reduce=fitted.reduce).eval()
    assert dial.cost(1).gmacs <= budget
    torch.testing.assert_close(dial(seen), model(seen), atol=1e-3, rtol=1e-3)
    if not given:
        half = td.wrap(vit, reduce=method.with_schedules([degree.found.removed])).eval()
        assert (half(seen) - model(seen)).abs().max() > 0.01


def test_schedules_of_more_layers_than_the_model_has_are_refused():
    model = td.wrap(tiny_vit(depth=2))
    with pytest.raises(ValueError, match=r"r must have at most 2 entries \(one per layer\), got 3"):
        td.fit(model, images(2), gmacs=0.01, reduce=td.ToMe(r=[1, 1, 1]))


@torch.no_grad()
def test_agreement_is_that_of_the_model_with_itself():
    model = td.wrap(tiny_vit(depth=2)).eval()
    seen = images(8)
    fitted = td.fit(model, seen, gmacs=0.6 * model.cost().gmacs, minutes=0.05, batch_size=4)
    found = fitted.degrees[0].found
    reduced = td.wrap(model.vit, reduce=td.ToMe(r=list(found.removed))).eval()
    p, q = model(seen).log_softmax(-1), reduced(seen).log_softmax(-1)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))


def test_labels_that_do_not_exclude_each_other_are_compared_one_by_one():
    logits, unreduced = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 3.0]])
    agreement = compare_logits(binary_logits(logits), binary_logits(unreduced))
    p, q = unreduced.sigmoid(), logits.sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert agreement.divergence == pytest.approx(float(expected.mean()))
    assert agreement.top1 == 0.5


def test_a_measured_budget_gives_a_dial(monkeypatch):
    """The clock ticks 0.1 ms for each token that an FFN reads, whatever the machine does."""
    model = td.wrap(tiny_vit(patch_size=2, depth=3))
    now = 0.0

    def tick(layer, inputs, output):
        nonlocal now
        now += 1e-4 * inputs[0].shape[1]

    for block in model.vit.blocks:
        block.mlp.fc1.register_forward_hook(tick)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    fitted = td.fit(model, images(8), speedup=1.1, reduce=td.EViT(), minutes=0.02)
    assert fitted.unit == "ms"
    assert fitted.unreduced == pytest.approx(0.1 * 3 * 257)
    assert len(fitted.reduce.r) == 1
    (degree,) = fitted.degrees
    assert degree.found.cost < 1
    assert td.wrap(model.vit, reduce=fitted.reduce).cost().macs < model.cost().macs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of speedup, latency_ms, gmacs"),
        ({"speedup": 2, "gmacs": 1}, "give one of speedup, latency_ms, gmacs"),
        ({"speedup": ()}, "give one of speedup"),
        ({"speedup": -2.0}, "speedup must be above 0, got -2"),
        ({"speedup": float("nan")}, "speedup must be above 0, got nan"),
        ({"gmacs": 1e-6}, "gmacs must lie in .*all that ToMe can remove, got 1e-06"),
        ({"gmacs": 99}, "gmacs must lie in .* here, from nothing removed .*, got 99"),
        ({"gmacs": 0.01, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gmacs": 0.01, "minutes": 0}, "minutes must be above 0, got 0"),
        (
            {"gmacs": 0.01, "reduce": td.FFNMerge(r=8)},
            "removes tokens by number, such as ToMe or EViT, got FFNMerge",
        ),
    ],
)
def test_budgets_that_make_no_sense_raise(vit, settings, message):
    with pytest.raises(ValueError, match=message):
        td.fit(td.wrap(vit), images(2), **settings)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"reduce": td.DAR()}, "reduce must be a method that removes tokens by number, .* got DAR"),
        ({"reduce": td.FFNMerge(r=8)}, "reduce must be a method that removes tokens by number"),
        ({"adapt": td.ConvPass(dim=4)}, "ConvPass needs the tokens of all patches"),
    ],
)
def test_models_whose_tokens_cannot_be_counted_raise(vit, methods, message):
    with pytest.raises(ValueError, match=message):
        td.fit(td.wrap(vit, **methods), images(2), gmacs=0.01)


@torch.no_grad()
def outputs_of(model, agree_by, seen):
    """What the model and the model with the fitted schedule are compared by."""
    run = {"masks": model, "feature_map": model.feature_map}.get(agree_by, model.embeddings)
    model.set_degree(0)
    unreduced = run(seen)
    model.set_degree(1)
    return unreduced, run(seen)


def by_hand(agree_by, unreduced, reduced):
    """Divergence and what stays the same, from loops over images and from probabilities."""
    if agree_by in ("embeddings", "neighbours"):
        # 16 images: each is compared by its 2 nearest others.
        nearest = [
            torch.stack([torch.cosine_similarity(one, some) for one in some])
            .fill_diagonal_(-2)
            .topk(2)
            .indices.tolist()
            for some in (unreduced, reduced)
        ]
        kept = sum(len(set(a) & set(b)) / 2 for a, b in zip(*nearest, strict=True)) / len(reduced)
        cosine = float(torch.cosine_similarity(unreduced, reduced).mean())
        return (1 - cosine if agree_by == "embeddings" else 1 - kept), kept
    if agree_by == "feature_map":
        cosine = float(torch.cosine_similarity(unreduced, reduced, dim=1).mean())
        return 1 - cosine, cosine
    if unreduced.shape[1] == 1:
        p, q = unreduced.sigmoid(), reduced.sigmoid()
        divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        inside, other = (unreduced > 0).flatten(1), (reduced > 0).flatten(1)
        overlaps = [(a & b).sum() / (a | b).sum() for a, b in zip(inside, other, strict=True)]
        return float(divergence), float(torch.stack(overlaps).mean())
    p, q = unreduced.log_softmax(1), reduced.log_softmax(1)
    same = unreduced.argmax(1) == reduced.argmax(1)
    return float((p.exp() * (p - q)).sum(1).mean()), float(same.float().mean())


@pytest.mark.parametrize(
    ("agree_by", "settings"),
    [
        (None, {}),
        ("neighbours", {}),
        ("feature_map", {}),
        (None, {"decode": td.LinearDecoder(num_classes=1)}),
        (None, {"decode": td.LinearDecoder(num_classes=3)}),
        ("embeddings", {"decode": td.LinearDecoder(num_classes=1)}),
    ],
    ids=["headless", "neighbours", "feature map", "mask", "mask of classes", "its backbone"],
)
@torch.no_grad()
def test_a_model_without_a_head_agrees_by_what_it_gives(agree_by, settings):
    vit, seen = tiny_vit(num_classes=0, depth=2), images(16)
    model = td.wrap(vit, **settings).eval()
    if model.decoder:
        torch.nn.init.normal_(
            model.decoder.weight, std=0.2, generator=torch.Generator().manual_seed(0)
        )
    fitted = td.fit(
        model,
        seen,
        gmacs=0.6 * model.cost().gmacs,
        agree_by=agree_by,
        minutes=0.05,
        batch_size=5,
    )
    expected = agree_by or ("masks" if settings else "embeddings")
    assert fitted.agree_by == fitted.to_json()["agree_by"] == expected
    dial = td.wrap(copy.deepcopy(vit), reduce=fitted.reduce, **settings).eval()
    if model.decoder:
        dial.decoder.load_state_dict(model.decoder.state_dict())
    assert (fitted.images, fitted.images_judged) == (8, 8)
    divergence, same = by_hand(expected, *outputs_of(dial, expected, seen[8:]))
    found = fitted.degrees[0].found
    assert divergence > 1e-4
    assert same < 1
    assert found.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert found.top1 == pytest.approx(same, abs=1e-6)
    assert found.divergence <= fitted.degrees[0].constant.divergence


def test_masks_that_are_both_empty_are_the_same():
    empty = torch.full((1, 1, 2, 2), -3.0)
    full = -empty
    agreement = compare_masks(torch.cat([empty, full]), torch.cat([empty, full]))
    assert (agreement.divergence, agreement.top1) == (0.0, 1.0)
    assert compare_masks(full, empty).top1 == 0.0


@torch.no_grad()
def test_as_many_maps_are_compared_as_memory_allows(monkeypatch):
    model = td.wrap(tiny_vit(num_classes=0, depth=2))
    # A map has 48 x 8 x 8 numbers of 4 bytes.
    monkeypatch.setattr("tokendial.tune.agreement._MAX_BYTES", 5 * 48 * 64 * 4)
    settings = {"gmacs": 0.6 * model.cost().gmacs, "minutes": 0.05, "batch_size": 4}
    notes = []
    fitted = td.fit(model, images(16), agree_by="feature_map", note=notes.append, **settings)
    assert fitted.images == 8
    assert "searching on 8 of 16 images, judging on 8 others" in notes
    assert any("1 - cosine" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "agree_by", "message"),
    [
        ({}, "logits", "agree_by logits needs a model with a classification head"),
        ({}, "masks", "agree_by masks needs a model with a decoder"),
        ({}, "cosine", "agree_by must be one of logits, embeddings, .*, got 'cosine'"),
        ({"decode": td.LinearDecoder()}, "logits", "agree_by logits needs a model with a class"),
    ],
)
def test_a_comparison_that_the_model_does_not_have_raises(settings, agree_by, message):
    model = td.wrap(tiny_vit(num_classes=0), **settings)
    with pytest.raises(ValueError, match=message):
        td.fit(model, images(2), gmacs=0.01, agree_by=agree_by)


def test_neighbours_need_two_images():
    with pytest.raises(ValueError, match="agree_by embeddings needs at least 2 images, got 1"):
        td.fit(td.wrap(tiny_vit(num_classes=0)), images(1), gmacs=0.01)


@pytest.mark.parametrize("agree_by", ["logits", "embeddings", "feature_map"])
@torch.no_grad()
def test_a_model_of_clips_is_fitted_on_clips(agree_by):
    model = td.wrap(td.video_vit(tiny_vit(depth=3), frames=2, num_classes=5)).eval()
    clips = images(48).unflatten(0, (24, 2))
    budget = 0.7 * model.cost().gmacs
    fitted = td.fit(model, clips, gmacs=budget, agree_by=agree_by, minutes=0.05)
    (row,) = fitted.degrees
    dial = td.wrap(model.vit, reduce=fitted.reduce).eval()
    assert dial.cost(1).gmacs <= budget
    dial.set_degree(1)
    others = clips[fitted.images :][: fitted.images_judged]
    if agree_by == "feature_map":
        pairs = dial.feature_map(others), model.feature_map(others)
        cosine = torch.cosine_similarity(*(each.movedim(2, -1) for each in pairs), dim=-1)
        assert row.found.top1 == pytest.approx(float(cosine.mean()), abs=1e-5)
    if agree_by == "logits":
        same = model(others).argmax(1) == dial(others).argmax(1)
        assert row.found.top1 == pytest.approx(float(same.float().mean()))
    with pytest.raises(ValueError, match=re.escape("images must be [N, T, 3, H, W] with N > 0")):
        td.fit(model, images(8), gmacs=budget)


def fitted_at(cost, *, spread=0.0):
    point = FitPoint((0, 1), cost=cost, divergence=0.0, top1=1.0)
    return FitResult(
        reduce=td.ToMe(r=[[0, 1]]),
        kind="speedup",
        unreduced=10.0,
        batch_size=8,
        images=8,
        images_judged=8,
        degrees=(FittedDegree(1, 1.5, point, None),),
        searched=(),
        constants=(),
        table=None,
        spread=spread,
    )


def test_a_fit_says_when_it_is_far_from_its_budget_on_either_side_or_was_disturbed():
    assert fitted_at(1 / 1.5).warnings() == []
    assert fitted_at(0.75).warnings() == ["degree 1 misses its budget by 12%."]
    (below,) = fitted_at(1 / 2.34).warnings()
    assert "stays 36% below its budget, at 2.34 times the speed of degree 0" in below
    (disturbed,) = fitted_at(1 / 1.5, spread=0.4).warnings()
    assert "times differed by 40% between passes" in disturbed
