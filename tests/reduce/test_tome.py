from itertools import pairwise

import pytest
import torch
from examples import golden, golden_vit, images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.reduce import tome
from tokendial.reduce.schedules import patches_after_layers
from tokendial.reduce.tome import bipartite_matching, random_matching
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens

MATCHING = [
    "tome_matching_cls",
    "tome_matching_cls_dist",
    "tome_matching_cls_even",
    "tome_matching_cls_rmax",
    "tome_matching_plain",
    "tome_matching_plain_even_rmax",
]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def source_of(grouping: Grouping) -> torch.Tensor:
    """0/1 matrix [B, G, N]: which old tokens are in which new one."""
    groups = torch.arange(grouping.keep.shape[1])[:, None]
    return (grouping.index[:, None, :] == groups).float()


def matching(case: str) -> tuple[dict, dict, Grouping, int]:
    meta, tensors = golden(case)
    settings = meta["settings"]
    prefix = settings["class_token"] + settings["distill_token"]
    grouping = bipartite_matching(tensors["input.metric"], settings["r"], num_prefix_tokens=prefix)
    assert grouping is not None
    return settings, tensors, grouping, prefix


# The reference can also take the element-wise maximum ("amax"), which this library cannot.
@pytest.mark.parametrize("case", MATCHING)
def test_matching_equals_the_reference(case):
    _, tensors, grouping, prefix = matching(case)
    unm, src, dst = (tensors[f"output.{name}_idx"] for name in ("unm", "src", "dst"))
    assert torch.equal(grouping.src, 2 * src)
    left, odd = 2 * unm, torch.arange(1, grouping.num_tokens, 2).expand(len(unm), -1)
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    expected = [
        left[:, :even_prefix],
        odd[:, :odd_prefix],
        left[:, even_prefix:],
        odd[:, odd_prefix:],
    ]
    assert torch.equal(grouping.keep, torch.cat(expected, dim=1))
    absorbing = grouping.keep.gather(1, grouping.dst)
    assert torch.equal(absorbing, 2 * dst + 1)


@pytest.mark.parametrize("case", MATCHING)
def test_merging_equals_the_reference(case):
    _, tensors, grouping, _ = matching(case)
    x, size = tensors["input.x"], tensors["input.size"]
    torch.testing.assert_close(grouping.merge(x), tensors["output.merge_mean"], **CLOSE)
    torch.testing.assert_close(grouping.sum(x), tensors["output.merge_sum"], **CLOSE)
    torch.testing.assert_close(grouping.merge(x), tensors["output.wavg_size_none.x"], **CLOSE)
    tokens = Tokens(x, 0, (1, 1), size=size.squeeze(-1)).apply_grouping(grouping)
    torch.testing.assert_close(tokens.x, tensors["output.wavg.x"], **CLOSE)
    torch.testing.assert_close(tokens.size, tensors["output.wavg.size"].squeeze(-1), **CLOSE)
    assert torch.equal(source_of(grouping), tensors["output.source_none"])


@pytest.mark.parametrize("case", [case for case in MATCHING if case != "tome_matching_cls_dist"])
def test_unmerging_equals_the_reference(case):
    # With a distillation token, unmerge of the reference does not invert its merge (see its JSON).
    _, tensors, grouping, _ = matching(case)
    restored = grouping.unmerge(grouping.merge(tensors["input.x"]))
    torch.testing.assert_close(restored, tensors["output.unmerge_of_merge_mean"], **CLOSE)


@pytest.mark.parametrize("case", MATCHING)
def test_a_second_step_equals_the_reference(case):
    settings, tensors, grouping, prefix = matching(case)
    size = tensors["input.size"].squeeze(-1)
    tokens = Tokens(tensors["input.x"], prefix, (1, 1), size=size).apply_grouping(grouping)
    second = bipartite_matching(
        tensors["input.metric2"], settings["r_second"], num_prefix_tokens=prefix
    )
    assert second is not None
    tokens = tokens.apply_grouping(second)
    torch.testing.assert_close(tokens.x, tensors["output.second.x"], **CLOSE)
    torch.testing.assert_close(tokens.size, tensors["output.second.size"].squeeze(-1), **CLOSE)
    source = source_of(second) @ source_of(grouping)
    assert torch.equal(source, tensors["output.second.source"])


@pytest.mark.parametrize("k", [2, 4])
def test_kth_matching_equals_the_reference(k):
    _, tensors = golden(f"tome_kth_k{k}")
    x, metric = tensors["input.x"], tensors["input.metric"]
    grouping = bipartite_matching(metric, x.shape[1], stride=k)
    assert grouping is not None
    sources = [n for n in range(x.shape[1]) if n % k != k - 1]
    assert torch.equal(grouping.index[:, sources], tensors["output.dst_idx"])
    torch.testing.assert_close(grouping.merge(x), tensors["output.merge_mean"], **CLOSE)
    torch.testing.assert_close(grouping.sum(x), tensors["output.merge_sum"], **CLOSE)
    restored = grouping.unmerge(grouping.merge(x))
    torch.testing.assert_close(restored, tensors["output.unmerge_of_merge_mean"], **CLOSE)
    tokens = Tokens(x, 0, (1, 1)).apply_grouping(grouping, track_size=True)
    torch.testing.assert_close(tokens.x, tensors["output.wavg_size_none.x"], **CLOSE)
    assert torch.equal(tokens.size, tensors["output.wavg_size_none.size"].squeeze(-1))
    assert torch.equal(source_of(grouping), tensors["output.source_none"])


@given(
    num_tokens=st.integers(1, 40),
    prefix=st.integers(0, 6),
    r=st.integers(0, 40),
    stride=st.integers(2, 5),
    random=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_matching_protects_the_prefix_and_loses_no_token(
    num_tokens, prefix, r, stride, random, seed
):
    num_tokens += prefix
    metric = torch.randn(2, num_tokens, 4, generator=torch.Generator().manual_seed(seed))
    if random:
        stride = 2
        grouping = random_matching(metric, r, num_prefix_tokens=prefix, seed=(seed,))
    else:
        grouping = bipartite_matching(metric, r, num_prefix_tokens=prefix, stride=stride)
    free = num_tokens - prefix
    merged = min(r, free * (stride - 1) // stride) if free >= stride else 0
    if merged == 0:
        assert grouping is None
        return
    index = grouping.index
    assert grouping.keep.shape == (2, num_tokens - merged)
    assert torch.equal(index[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (index[:, prefix:] >= prefix).all()
    for image in index:
        assert set(image.tolist()) == set(range(num_tokens - merged))


def test_random_matching_depends_on_the_seed_and_the_layer():
    model = {
        seed: td.wrap(tiny_vit(), reduce=td.ToMe(r=8, matching="random", seed=seed))
        for seed in (0, 1)
    }

    def kept(seed, layer):
        steps = list(model[seed].steps(images(1), track=True))
        return steps[layer - 1].tokens.origin.tolist()

    with torch.no_grad():
        assert kept(0, 1) == kept(0, 1)
        assert kept(0, 1) != kept(1, 1)
    metric = torch.randn(1, 65, 4)
    first, second = (random_matching(metric, 8, seed=(0, layer)).src for layer in (1, 2))
    assert not torch.equal(first, second)


def test_a_larger_stride_offers_more_degrees():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8, stride=4))
    assert model.degrees[-1] == 48
    assert model.cost(48).tokens_per_layer == (17, 5, 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "greedy"}, "matching must be one of bipartite, random, got 'greedy'"),
        ({"stride": 1}, "stride must be an integer of at least 2, got 1"),
        ({"stride": 4, "matching": "random"}, "stride must be 2 with random matching, got 4"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("method", [td.ToMe, td.FFNMerge])
def test_bad_settings_of_a_matching_raise(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def schedule_rows() -> list[dict]:
    rows = golden("tome_parse_r")[0]["rows"]
    # The reference accepts lists with more entries than layers; here they are an error.
    return [row for row in rows if len(row["result"]) == row["layers"]]


@pytest.mark.parametrize("row", schedule_rows())
def test_schedules_equal_the_reference(row):
    r = tuple(row["r"]) if row["r_type"] == "tuple" else row["r"]
    shape = ViTShape(row["layers"], 48, 1, num_patches=196, has_class_token=True)
    reducer = td.ToMe(r=r).build(shape)
    assert reducer.schedules[reducer.degree] == row["result"]


def tome_variants() -> dict[str, dict]:
    return golden("tome_vit")[0]["settings"]["variants"]


@pytest.mark.parametrize("variant", tome_variants())
@torch.no_grad()
def test_whole_model_equals_the_reference(variant):
    meta, tensors, vit = golden_vit("tome_vit")
    settings = meta["settings"]["variants"][variant]
    r = tuple(settings["r"]) if settings["r_type"] == "tuple" else settings["r"]
    model = td.wrap(vit, reduce=td.ToMe(r=r, proportional_attention=settings["prop_attn"]))
    expected = {
        key.removeprefix(f"output.{variant}."): value
        for key, value in tensors.items()
        if key.startswith(f"output.{variant}.")
    }
    torch.testing.assert_close(model(tensors["input"]), expected["logits"], atol=1e-4, rtol=0)
    steps = list(model.steps(tensors["input"], track=True))
    counts = [step.tokens.x.shape[1] for step in steps]
    assert counts == expected["tokens_per_layer"].tolist()
    last = steps[-1].tokens
    torch.testing.assert_close(last.x, expected["final_tokens"], atol=2e-4, rtol=0)
    if "final_size" in expected:
        assert torch.equal(last.size, expected["final_size"].squeeze(-1))
        groups = torch.arange(last.x.shape[1])[:, None]
        source = (last.origin[:, None, :] == groups).to(torch.uint8)
        assert torch.equal(source, expected["final_source"])


def test_a_list_longer_than_the_model_is_deep_raises(vit):
    with pytest.raises(ValueError, match=r"r must have at most 4 entries \(one per layer\), got 5"):
        td.wrap(vit, reduce=td.ToMe(r=[1] * 5))


def test_a_list_of_r_can_be_turned_off(vit):
    model = td.wrap(vit, reduce=td.ToMe(r=[4, 2]))
    assert (model.degree, model.degrees) == (1, (0, 1))
    model.set_degree(0)
    assert torch.equal(model(images()), vit(images()))


@pytest.mark.parametrize("method", [td.ToMe, td.EViT])
@given(lists=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=3))
def test_each_list_of_r_is_a_degree(method, lists):
    shape = ViTShape(4, 48, 1, num_patches=64, has_class_token=True)
    most = {td.ToMe: lambda patches: patches // 2, td.EViT: lambda patches: max(0, patches - 2)}
    dial = [patches_after_layers(64, some + [0] * (4 - len(some)), most[method]) for some in lists]
    if any(sum(after) > sum(before) for before, after in pairwise(dial)):
        with pytest.raises(
            ValueError,
            match="r must list the degrees from the most to the least expensive one, but degree",
        ):
            method(r=lists).build(shape)
        return
    reducer = method(r=lists).build(shape)
    assert (reducer.degrees, reducer.degree) == (tuple(range(len(lists) + 1)), 1)
    for degree, some in enumerate(lists, start=1):
        acting = [layer for layer in range(1, 5) if reducer.reduces_in(layer, degree)]
        assert acting == [layer for layer, r in enumerate(some, start=1) if r > 0]


@pytest.mark.parametrize("method", [td.ToMe, td.EViT])
@torch.no_grad()
def test_a_degree_of_lists_is_the_list_by_itself(method, tmp_path):
    lists = [[4, 0, 2], [40, 3], [32, 9, 9, 9]]
    model = td.wrap(tiny_vit(), reduce=method(r=lists)).eval()
    model.set_degree(2)
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path)
    assert (loaded.degree, loaded.degrees) == (2, (0, 1, 2, 3))
    for degree, some in enumerate(lists, start=1):
        alone = td.wrap(model.vit, reduce=method(r=some)).eval()
        for each in (model, loaded):
            each.set_degree(degree)
            assert each.cost().tokens_per_layer == alone.cost().tokens_per_layer
            assert torch.equal(each(images()), alone(images()))
    macs = [model.cost(degree).macs for degree in model.degrees]
    assert macs == sorted(macs, reverse=True)
    loaded.set_degree(0)
    assert torch.equal(loaded(images()), model.vit(images()))


@pytest.mark.parametrize("method", [td.ToMe, td.EViT])
@pytest.mark.parametrize("r", [[[8], 4], [[]], [[8, -1]], [[True]], [[[8]]], [8, [4]], [8.0]])
def test_lists_that_are_none_raise(method, r):
    with pytest.raises(ValueError, match=r"r must be an integer .*, got \["):
        method(r=r)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "map"])
def test_pooling_counts_merged_tokens_by_their_size(pool):
    model = td.wrap(tiny_vit(global_pool=pool, class_token=False), reduce=td.ToMe(r=6))
    with torch.no_grad():
        for step in model.steps(images(), track=True):
            tokens = step.tokens
        restored = model.vit.norm(tokens.restore_positions())
        torch.testing.assert_close(model(images()), model.vit.forward_head(restored))


def test_large_images_are_matched_some_tokens_at_a_time(monkeypatch):
    metric = torch.randn(2, 65, 8)
    whole = bipartite_matching(metric, 12, num_prefix_tokens=1)
    monkeypatch.setattr(tome, "MAX_SIMILARITIES", 100)
    parts = bipartite_matching(metric, 12, num_prefix_tokens=1)
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("settings", [{}, {"matching": "random"}, {"stride": 3}])
@torch.no_grad()
def test_sizes_can_count_by_similarity(settings):
    """Features are those of the plain method in the first layer; sizes are at most as large."""
    plain, weighed = (
        td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8, sizes=sizes, **settings)).eval()
        for sizes in ("count", "similarity")
    )
    count, similarity = (next(iter(model.steps(images()))).tokens for model in (plain, weighed))
    torch.testing.assert_close(count.x, similarity.x)
    merged = count.size > 1
    assert torch.equal(similarity.size[~merged], count.size[~merged])
    assert (similarity.size[merged] < count.size[merged]).all()
    assert (similarity.size >= 1).all()
    keys = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]]])
    grouping = bipartite_matching(keys, 2, weigh_sizes=True)
    torch.testing.assert_close(grouping.sizes(torch.ones(1, 4)), torch.tensor([[1.8, 1.8]]))
