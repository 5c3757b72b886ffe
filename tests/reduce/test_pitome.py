from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from examples import golden, images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.reduce import tome
from tokendial.reduce.pitome import energy, energy_matching
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CASES = ["pitome_matching", "pitome_matching_bsm"]
SHAPE = ViTShape(depth=5, embed_dim=48, num_prefix_tokens=1, num_patches=64, has_class_token=True)


def unit(metric: torch.Tensor) -> torch.Tensor:
    return F.normalize(metric, dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_energy_and_merging_equal_the_reference(case):
    meta, tensors = golden(case)
    settings, metric = meta["settings"], tensors["input.metric"]
    found = energy(unit(metric[:, 1:]), settings["margin"])
    torch.testing.assert_close(found, tensors["output.energy"], **CLOSE)
    grouping = energy_matching(
        metric,
        settings["r"],
        margin=settings["margin"],
        num_prefix_tokens=1,
        any_token=settings["use_bsm_pitome"],
    )
    for name, size in (("wavg_size_none", None), ("wavg", tensors["input.size"][..., 0])):
        tokens = Tokens(tensors["input.x"], prefix=1, grid=(5, 5), size=size)
        merged = tokens.apply_grouping(grouping, track_size=True)
        torch.testing.assert_close(merged.x, tensors[f"output.{name}.x"], **CLOSE)
        torch.testing.assert_close(merged.size, tensors[f"output.{name}.size"][..., 0], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_ratio_of_the_reference_merges_as_many(case):
    settings = golden(case)[0]["settings"]
    reducer = td.PiToMe(keep_ratio=settings["ratio"]).build(SHAPE)
    assert reducer.num_merged(1, reducer.degree, settings["tokens"] - 1) == settings["r"]


def test_energy_by_pairs():
    vectors = unit(torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)))
    for margin in (0.75, 0.0):
        expected = torch.stack(
            [
                torch.stack([F.elu((row * other).sum() - margin) for other in image]).mean()
                for image in vectors
                for row in image
            ]
        ).view(2, 9)
        torch.testing.assert_close(energy(vectors, margin), expected)


def test_a_token_that_stands_alone_is_protected_and_a_plain_area_merges():
    """Seven tokens point one way, with a little noise; the eighth points another way."""
    noise = 0.01 * torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    metric = torch.tensor([1.0, 0.0, 0.0]) + noise
    metric[0, 5] = torch.tensor([0.0, 1.0, 0.0])
    grouping = energy_matching(metric, 3, margin=0.5)
    alone = int(grouping.index[0, 5])
    assert (grouping.index[0] == alone).sum() == 1
    assert grouping.keep.shape[1] == 5


@given(
    tokens=st.integers(2, 30), prefix=st.integers(0, 3), r=st.integers(0, 20), first=st.booleans()
)
def test_as_many_merge_as_asked_and_prefix_tokens_stay(tokens, prefix, r, first):
    metric = torch.randn(2, prefix + tokens, 6, generator=torch.Generator().manual_seed(tokens))
    grouping = energy_matching(metric, r, margin=0.3, num_prefix_tokens=prefix, any_token=first)
    merged = min(r, tokens // 2)
    if not merged:
        assert grouping is None
        return
    assert grouping.keep.shape[1] == prefix + tokens - merged
    assert grouping.src.shape[1] == merged
    assert torch.equal(grouping.keep[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (grouping.dst >= prefix).all()
    named = torch.cat([grouping.keep, grouping.src], dim=1).sort(dim=1).values
    assert torch.equal(named, torch.arange(prefix + tokens).expand(2, -1))


def test_large_images_are_matched_in_chunks(monkeypatch):
    metric = torch.randn(2, 41, 8, generator=torch.Generator().manual_seed(0))
    for first in (False, True):
        whole = energy_matching(metric, 9, margin=0.5, num_prefix_tokens=1, any_token=first)
        with monkeypatch.context() as patched:
            for module in (tome, td.reduce.pitome):
                patched.setattr(module, "MAX_SIMILARITIES", 100)
            chunks = energy_matching(metric, 9, margin=0.5, num_prefix_tokens=1, any_token=first)
        assert torch.equal(whole.keep, chunks.keep)
        assert torch.equal(whole.dst, chunks.dst)


def test_half_precision_merges_as_float32():
    metric = torch.randn(2, 65, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = energy_matching(metric.float(), 9, margin=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(energy_matching(metric, 9, margin=0.5).keep, expected.keep)


def test_the_margin_falls_from_the_first_to_the_last_layer():
    reducer = td.PiToMe(margin=(0.8, 0.4)).build(SHAPE)
    assert [reducer.margin(layer) for layer in range(1, 6)] == pytest.approx(
        [0.8, 0.7, 0.6, 0.5, 0.4]
    )
    assert td.PiToMe().build(replace(SHAPE, depth=1)).margin(1) == 0.75


def test_the_first_half_of_the_layers_may_merge_any_token(monkeypatch):
    seen = []

    def record(*args, any_token, **kwargs):
        seen.append(any_token)
        return energy_matching(*args, any_token=any_token, **kwargs)

    monkeypatch.setattr("tokendial.reduce.pitome.energy_matching", record)
    for first, expected in ((None, [True, True, False, False]), (1, [True] + 3 * [False])):
        seen.clear()
        td.wrap(tiny_vit(), reduce=td.PiToMe(r=4, first_layers=first))(images())
        assert seen == expected


def test_dials():
    by_number = td.PiToMe().build(SHAPE)
    assert (by_number.degrees, by_number.degree) == (tuple(range(33)), 8)
    by_ratio = td.PiToMe(keep_ratio=0.93).build(SHAPE)
    kept = [64 - by_ratio.num_merged(1, degree, 64) for degree in by_ratio.degrees]
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[by_ratio.degree], kept[-1]) == (64, 60, 32)
    by_list = td.PiToMe(r=[[4, 0, 4], [8, 8]]).build(SHAPE)
    assert [by_list.num_merged(layer, 1, 64) for layer in (1, 2, 3, 4)] == [4, 0, 4, 0]
    assert [by_list.reduces_in(layer, 2) for layer in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "keep_ratio": 0.9}, "set r or keep_ratio, not both: got r=4 and keep_ratio=0.9"),
        ({"keep_ratio": 0.4}, r"keep_ratio must lie in \[0.5, 1\], got 0.4"),
        ({"keep_ratio": 1.2}, "keep_ratio must"),
        ({"r": -1}, "r must be an integer of at least 0"),
        ({"margin": 0.5}, "margin must be two numbers"),
        ({"margin": (0.5, 2.0)}, r"margin must be two numbers in \[-1, 1\], got \(0.5, 2.0\)"),
        ({"first_layers": -1}, "first_layers must"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        td.PiToMe(**settings)
