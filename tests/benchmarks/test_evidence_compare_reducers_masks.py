"""The comparison of reduction methods by masks, whole, on a tiny model and random pictures."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tokendial as td
from benchmarks.evidence_real import compare_reducers, compare_reducers_masks
from benchmarks.evidence_real.common import Options
from benchmarks.evidence_real.compare_reducers import COSTS, SMALLER, Setting
from benchmarks.evidence_real.compare_reducers_masks import HEADER, cells, predict, rows
from tokendial.data.transforms.masks import MaskAugment
from tokendial.tasks import BinaryMasks

SIDE, PICTURES = 32, 6


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Where results go; the model and the pictures are tiny."""

    def load_model(side, config, options):
        torch.manual_seed(0)
        shape = {"patch_size": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
        vit = timm.create_model("vit_tiny_patch16_224", img_size=side, **shape)
        model = td.wrap(vit, reduce=config, decode=td.LinearDecoder()).eval()
        torch.nn.init.normal_(model.decoder.weight)
        return model, BinaryMasks(MaskAugment())

    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(PICTURES, SIDE, SIDE, 3), dtype=np.uint8)
    target = np.zeros((SIDE, SIDE), np.uint8)
    target[4:20, 8:24] = 1
    pairs = [(Image.fromarray(picture), target) for picture in pixels]
    methods = {"ToMe": td.ToMe(), "EViT": td.EViT(r=8)}
    for module in (compare_reducers, compare_reducers_masks):
        monkeypatch.setattr(module, "METHODS", methods)
    for name in ("training_pairs", "test_pairs"):
        monkeypatch.setattr(compare_reducers_masks, name, lambda options: pairs)
    monkeypatch.setattr(compare_reducers, "SECONDS", 0.0)
    changes = {"load_model": load_model, "IMG_SIZE": SIDE, "SIDES": (28, 24, 20)}
    for name, value in (changes | {"_PICTURES": PICTURES, "_MINUTES": 0.02}).items():
        monkeypatch.setattr(compare_reducers_masks, name, value)
    return Options(out=tmp_path, jobs=1)


def test_every_method_is_compared_at_the_wanted_costs(options):
    for method in ("ToMe", "EViT", SMALLER):
        compare_reducers_masks.compute(method, options)
    found = rows(options)
    assert len(found) == len(COSTS) * (2 * 2 + 1 + 1)
    whole = predict(Setting(), options)
    for row in found:
        # There are few sizes of smaller pictures.
        assert row["cost"] == pytest.approx(row["wanted"], abs=0.12)
        assert row["speed"] > 0
        assert row["img_size"] < SIDE if row["method"] == SMALLER else row["reduce"]
        own = predict(Setting(row["method"], row["schedule"], row["wanted"]), options)
        bits = [np.unpackbits(each["masks"], axis=1) for each in (own, whole)]
        shared = (bits[0] & bits[1]).sum(1) / (bits[0] | bits[1]).sum(1)
        assert row["IoU"].value == pytest.approx(shared.mean())
        assert row["IoU lost"].value == pytest.approx(1 - shared.mean())
        difference = own["scores"][:, 0] - whole["scores"][:, 0]
        assert row["S minus degree 0"].value == pytest.approx(difference.mean())
        if (row["method"], row["schedule"]) == ("ToMe", "constant"):
            assert row["lost / ToMe's"].value == 1.0
    assert all(row["cost"] <= row["wanted"] for row in found if row["schedule"] == "fitted")
    assert 0 < min(row["IoU"].value for row in found) < 1
    lines = cells(found)
    assert [line[:2] for line in lines] == compare_reducers.kinds()
    assert {len(line) for line in lines} == {len(HEADER)}


def test_degree_0_loses_nothing(options):
    whole = predict(Setting(), options)
    assert whole["share"] == 1.0
    assert (compare_reducers_masks.overlaps(whole["masks"], whole["masks"]) == 1).all()
