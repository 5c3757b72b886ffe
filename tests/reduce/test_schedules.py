"""Schedules written as numbers of tokens and as shares of an image's patches."""

import dataclasses

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.methods import from_json, to_json
from tokendial.reduce.schedules import PerLayer

SHARES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)
METHODS = [td.ToMe, td.EViT, td.PiToMe, td.PruneMerge]


@given(SHARES, st.integers(1, 2000))
def test_shares_are_rounded_together(shares, num_patches):
    counts = PerLayer(shares).counts(num_patches)
    assert min(counts) >= 0
    assert sum(counts) == round(sum(shares) * num_patches)


def test_small_shares_are_not_lost():
    assert sum(PerLayer([0.005] * 12).counts(64)) == 4


def test_numbers_and_shares_may_stand_side_by_side():
    assert PerLayer([3, 0.25, 1.0, 0]).counts(16) == [3, 4, 16, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("img_size", [64, 128])
def test_shares_mean_the_same_at_every_image_size(method, img_size):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=img_size, depth=3, num_classes=0)
    model = td.wrap(vit, reduce=method(r=[0.25, 0, 0.125]))
    patches = (img_size // 16) ** 2
    model.eval()
    with torch.inference_mode():
        left = [step.tokens.x.shape[1] for step in model.steps(torch.randn(1, 3, *[img_size] * 2))]
    assert left[-1] - left[-2] == -round(patches / 8)
    assert left[0] - left[-1] == round(3 * patches / 8) - round(patches / 4)


@pytest.mark.parametrize("method", METHODS)
def test_shares_are_stored_as_shares(method):
    config = method(r=[[0.05, 2], [0.25, 0.1]])
    assert to_json("reduce", config)["r"] == [[0.05, 2], [0.25, 0.1]]
    assert from_json("reduce", to_json("reduce", config)) == config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("r", [[0.5, -0.1], [1.5], [float("nan")], 0.5, [[0.1], 0.1]])
def test_other_values_are_refused(r):
    with pytest.raises(ValueError, match=r"r must be an integer .* shares of the patches in"):
        td.ToMe(r=r)


def test_dropped_tokens_of_prune_merge_are_numbers():
    with pytest.raises(ValueError, match="pruned must be a list of integers, and so must r"):
        td.PruneMerge(r=[0.5, 0.25], pruned=[1, 1])
