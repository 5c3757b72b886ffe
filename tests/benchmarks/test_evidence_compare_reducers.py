"""The comparison of reduction methods, whole, on a tiny model and random images."""

import pytest
import timm
import torch

import tokendial as td
from benchmarks.evidence_real import compare_reducers, zero_training
from benchmarks.evidence_real.common import Options
from benchmarks.evidence_real.compare_reducers import COSTS, HEADER, Setting, cells, rows_of
from benchmarks.evidence_real.zero_training import SMALLER
from tokendial.measure import Resampling

SIDE, IMAGES = 32, 24


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Where results go; the backbone and the data are tiny."""
    torch.manual_seed(0)
    shape = {"patch_size": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    vits = {
        side: timm.create_model("vit_tiny_patch16_224", img_size=side, **shape).eval()
        for side in (SIDE, 28, 24, 20)
    }

    def images():
        noise = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
        return noise, torch.arange(IMAGES) % 3

    parts = {"train": images(), "test": images()}
    for module in (zero_training, compare_reducers):
        monkeypatch.setattr(module, "backbone", lambda side, options: vits[side])
        monkeypatch.setattr(module, "load_data", lambda data, options: parts)
        monkeypatch.setattr(module, "IMG_SIZE", SIDE)
    monkeypatch.setattr(zero_training, "SIDES", (28, 24, 20))
    monkeypatch.setattr(compare_reducers, "resampling", lambda data, options: Resampling(IMAGES, 1))
    monkeypatch.setattr(compare_reducers, "METHODS", {"ToMe": td.ToMe(), "PiToMe": td.PiToMe()})
    monkeypatch.setattr(compare_reducers, "_MINUTES", 0.02)
    monkeypatch.setattr(compare_reducers, "SECONDS", 0.0)
    return Options(out=tmp_path, jobs=1)


def test_every_method_is_compared_at_the_wanted_costs(options):
    for method in ("ToMe", "PiToMe", SMALLER):
        compare_reducers.compute(("elpv", method), options)
    rows = rows_of("elpv", options)
    assert len(rows) == len(COSTS) * (2 * 2 + 1 + 1)
    for row in rows:
        # There are few sizes of smaller images.
        off = 0.12 if row["method"] == SMALLER else 0.06
        assert row["cost"] == pytest.approx(row["wanted"], abs=off)
        assert row["speed"] > 0
    baseline = [row for row in rows if (row["method"], row["schedule"]) == ("ToMe", "constant")]
    for row in baseline:
        for what in ("changed", "probe changed"):
            assert row[f"{what} / ToMe's"].value == 1.0 or row[what].value == 0.0
    full, config = zero_training.features("elpv", zero_training.Reduction(), options), baseline[1]
    probe = compare_reducers.linear_probe(full)
    reduced = compare_reducers.values(Setting("ToMe", "constant", 0.6), "elpv", options)
    answers, whole = probe.predict(reduced["test"]), probe.predict(full["test"])
    assert 0 < config["probe changed"].value == pytest.approx((answers != whole).mean())
    right = (answers == full["test labels"]).mean() - (whole == full["test labels"]).mean()
    assert config["probe minus degree 0"].value == pytest.approx(right)
    assert all(row["cost"] <= row["wanted"] for row in rows if row["schedule"] == "fitted")
    lines = cells(rows)
    assert [line[1:3] for line in lines] == compare_reducers.kinds()
    assert {len(line) for line in lines} == {len(HEADER)}
    (axis,) = compare_reducers.figure_of([rows]).axes
    assert len(axis.containers) == len(lines)


def test_what_was_computed_is_not_computed_again(options, monkeypatch):
    setting = Setting("ToMe", "constant", 0.6)
    first = compare_reducers.values(setting, "elpv", options)
    monkeypatch.setattr(compare_reducers, "compute_features", None)
    again = compare_reducers.values(setting, "elpv", options)
    assert (first["test"] == again["test"]).all()
