import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tokendial as td
from benchmarks.evidence_real import diversity, masks
from benchmarks.evidence_real.mask_models import trained_models
from benchmarks.evidence_real.matched_costs import (
    COSTS,
    FAMILIES,
    Reduction,
    nearest,
    reduce_config,
    reductions,
)
from benchmarks.evidence_real.zero_training import HEADER, cells, per_image
from tokendial.data.transforms.masks import MaskAugment
from tokendial.measure import Interval
from tokendial.measure.neighbours import predict_classes
from tokendial.tasks import BinaryMasks

FALLING = (0.95, 0.9, 0.8, 0.55, 0.5)


def tiny_vit() -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=192,
        num_heads=3,
        num_classes=0,
    )


@pytest.mark.parametrize(
    ("wanted", "position"), [(1.0, 0), (0.93, 0), (0.89, 1), (0.7, 2), (0.6, 3), (0.1, 4)]
)
def test_the_setting_with_the_nearest_cost_is_chosen(wanted, position):
    assert nearest(FALLING.__getitem__, len(FALLING), wanted) == position


def test_a_setting_is_found_without_trying_all():
    tried = []

    def share_at(position: int) -> float:
        tried.append(position)
        return 1 - position / 1000

    assert nearest(share_at, 1000, 0.6) == 400
    assert len(set(tried)) < 15


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_reaches_the_highest_and_the_lowest_cost(family):
    vit = tiny_vit()
    whole = td.wrap(vit).cost().macs
    for wanted in (COSTS[0], COSTS[-1]):
        config, share = reduce_config(Reduction(family, wanted), vit)
        assert td.wrap(vit, reduce=config).cost().macs / whole == share
        assert share == pytest.approx(wanted, abs=0.05)


def test_the_cost_of_a_decoder_counts():
    vit = tiny_vit()
    decode = td.DARDecoder(channels=64)
    config, share = reduce_config(Reduction("ToMe", 0.8), vit, decode)
    whole = td.wrap(vit, decode=decode).cost().macs
    assert td.wrap(vit, reduce=config, decode=decode).cost().macs / whole == share


def test_neighbours_vote_by_the_direction_of_features():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 50.0]])
    test = torch.tensor([[9.0, 1.0], [0.1, 0.2]])
    found = predict_classes(train, torch.tensor([0, 0, 1]), test, neighbours=1)
    assert found.tolist() == [0, 1]


def test_near_neighbours_outvote_more_distant_ones():
    # One neighbour at similarity 1 has a vote of exp(1 / 0.07), two at 0.9 together half of that.
    side = (1 - 0.9**2) ** 0.5
    train = torch.tensor([[1.0, 0.0], [0.9, side], [0.9, -side], [-1.0, 0.0]])
    labels = torch.tensor([2, 0, 0, 1])
    assert predict_classes(train, labels, torch.tensor([[3.0, 0.0]]), neighbours=3).tolist() == [2]
    three = train[[0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]]
    labels = torch.tensor([2] + [0] * 10)
    assert predict_classes(three, labels, torch.tensor([[3.0, 0.0]]), neighbours=11).tolist() == [0]


def test_overlap_is_intersection_over_union():
    first = np.zeros((3, 16), bool)
    second = np.zeros((3, 16), bool)
    first[0, :4], second[0, 2:8] = True, True
    first[1, 3] = True
    packed = np.packbits(first, axis=1), np.packbits(second, axis=1)
    np.testing.assert_allclose(masks.overlaps(*packed), [2 / 8, 0, np.nan])


def test_masks_of_pictures_come_with_scores_where_there_is_a_target():
    model = td.wrap(tiny_vit(), decode=td.LinearDecoder())
    torch.nn.init.normal_(model.decoder.weight, generator=torch.Generator().manual_seed(0))
    task = BinaryMasks(MaskAugment())
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(40, 56, 3), dtype=np.uint8))
    target = np.zeros((40, 56), np.uint8)
    target[10:20, 10:30] = 1
    side = masks.IMG_SIZE
    found = masks.predict_masks(model, task, [(picture, target), (picture, None)])
    assert found["masks"].shape == (2, side * side // 8)
    assert (found["masks"][0] == found["masks"][1]).all()
    with torch.inference_mode():
        logits = model(task.image_transform(model.anatomy)(picture)[None])
    metrics = task.metrics()
    metrics.update(logits, [torch.from_numpy(target)])
    expected = [float(metrics.compute()[name]) for name in masks.MEASURES]
    np.testing.assert_allclose(found["scores"][0], expected, rtol=1e-6)
    assert np.isnan(found["scores"][1]).all()
    inside = np.unpackbits(found["masks"][0]).reshape(side, side)
    enlarged = torch.nn.functional.interpolate(logits, (side, side), mode="bilinear")[0, 0]
    assert 0 < inside.mean() < 1
    assert (inside != (enlarged > 0).numpy()).mean() < 0.01


def test_differences_of_scores_are_paired():
    rng = np.random.default_rng(0)
    reference = [rng.uniform(size=(200, 4)) for _ in range(2)]
    found = masks.score_intervals([scores + 0.01 for scores in reference], reference)
    own, difference = found["mean_f"], found["mean_f, difference"]
    assert own.value == pytest.approx(np.mean([s[:, 1] + 0.01 for s in reference]))
    assert own.high - own.low > 0.02
    np.testing.assert_allclose([difference.low, difference.value, difference.high], 0.01)


def test_missing_values_are_left_out_of_a_mean():
    assert masks.over_pictures([np.array([0.5, np.nan, 0.7] * 20)]).value == pytest.approx(0.6)


def features(rng: np.random.Generator, shift: float) -> dict[str, np.ndarray]:
    """Features of 3 classes; `shift` turns them away from those of other calls."""
    found = {}
    for part, size in (("train", 60), ("test", 30)):
        labels = np.arange(size) % 3
        noise = rng.normal(scale=0.1, size=(size, 8)).astype(np.float32)
        found[part] = np.roll(np.eye(8, dtype=np.float32)[labels], round(shift), axis=1) + noise
        found[f"{part} labels"] = labels
    return found


def test_the_unreduced_model_agrees_with_itself():
    full = features(np.random.default_rng(0), 0)
    values = per_image(full, full)
    np.testing.assert_allclose(values["cosine"], 1, rtol=1e-6)
    np.testing.assert_array_equal(values["agreement"], 1)
    np.testing.assert_array_equal(values["same degree"], values["stored"])


def test_features_of_another_degree_may_fit_only_their_own_training_images():
    rng = np.random.default_rng(0)
    full, turned = features(rng, 0), features(rng, 1)
    values = per_image(turned, full)
    assert values["same degree"].mean() == 1
    assert values["stored"].mean() < 0.5
    # Answers are compared, not features: with its own training images the model is right, too.
    assert values["agreement"].mean() == 1
    assert values["cosine"].mean() < 0.5


def test_results_of_two_models_never_share_a_file():
    variants = [variant for group in diversity.groups().values() for variant in group]
    for names in (
        [variant.name for variant in variants],
        [model.name for model in trained_models()],
        [reduction.name for reduction in reductions(list(FAMILIES))],
    ):
        assert len(set(names)) == len(names)
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for name in names)


def test_a_line_of_the_table_shows_one_method_along_the_dial():
    value = Interval(0.5, 0.4, 0.6)

    def row(method: str, difference: float, cost: float = 0.9) -> dict[str, object]:
        change = Interval(difference, difference, difference)
        names = ("same degree, minus degree 0", "stored, minus degree 0")
        row = {"data": "elpv", "method": method, "same degree": value, "agreement": value}
        row |= {"cosine": value, "wanted": 0.9, "cost": cost}
        return row | dict.fromkeys(names, change)

    falling = [row(method, -cost) for method in ("ToMe", "EViT") for cost in (0.1, 0.2, 0.3, 0.4)]
    lines = cells([row("none", 0.0), *falling])
    assert [line[1] for line in lines[1:]] == ["ToMe", "EViT"]
    assert [text.split()[0] for text in lines[1][2:7]] == [
        *("-10.0", "-20.0", "-30.0", "-40.0", "-40.0")
    ]
    assert "50.0 (40.0, 60.0)" in lines[0][1]
    assert {len(line) for line in lines} == {len(HEADER)}
    assert "at" not in "".join(lines[1][2:6])
    far = cells([row("none", 0.0), *(row("smaller images", -0.1, cost=0.77) for _ in range(4))])
    assert all(text.endswith(" at 77%") for text in far[1][2:6])
