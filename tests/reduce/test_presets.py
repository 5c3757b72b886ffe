"""Presets: ready schedules, checked against what they promise."""

import json

import pytest
import timm

import tokendial as td
from tokendial.reduce.presets import all_presets

ROWS = [
    (backbone, method, keeps, row)
    for backbone, methods in all_presets().items()
    for method, ways in methods.items()
    for keeps, found in ways.items()
    for row in found["rows"]
]


@pytest.mark.parametrize(("backbone", "method", "keeps", "row"), ROWS)
def test_a_preset_costs_what_it_promises(backbone, method, keeps, row):
    vit = timm.create_model(backbone, img_size=224, num_classes=0)
    reduce = td.preset(backbone, speedup=row["speedup"], method=method, keeps=keeps)
    model = td.wrap(vit, reduce=reduce)
    assert (model.degrees, model.degree) == ((0, 1), 1)
    speedup = model.cost(0).macs / model.cost(1).macs
    assert 0.98 * row["speedup"] <= speedup <= 1.04 * row["speedup"]
    assert row["divergence"] <= row["divergence_constant"]


def test_several_speeds_are_degrees_in_rising_order():
    several = td.preset("vit_small_patch14_dinov2.lvd142m", speedup=(2.0, 1.25))
    assert several.r == (
        *td.preset("vit_small_patch14_dinov2", speedup=1.25).r,
        *td.preset("vit_small_patch14_dinov2", speedup=2).r,
    )
    assert len(td.preset("vit_small_patch14_dinov2").r) == 4


def test_a_preset_is_a_setting_like_any_other():
    reduce = td.preset("vit_small_patch14_dinov2", speedup=1.5)
    stored = json.loads(json.dumps(td.methods.to_json("reduce", reduce)))
    assert td.methods.from_json("reduce", stored) == reduce


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": "vit_tiny"},
            r"backbone must be one with a preset \(vit_small_patch14_dinov2",
        ),
        ({"method": "evit"}, "method must be one of .*tome.*, got 'evit'"),
        ({"keeps": "masks"}, "keeps must be one of .*embeddings.*, got 'masks'"),
        ({"speedup": 3.0}, "speedup must be one of 1.25, 1.5, 1.75, 2, got 3.0"),
    ],
)
def test_what_there_is_not_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        td.preset(**({"backbone": "vit_small_patch14_dinov2"} | settings))
