import pytest
import timm
import torch
import torch.nn.functional as F
from examples import golden, images, perturbed, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.reduce.diffrate_schedules import PUBLISHED
from tokendial.reduce.prune_merge import prune_and_merge
from tokendial.tokens import Tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHAPES = {
    "tiny": {"depth": 12, "embed_dim": 192, "num_heads": 3},
    "small": {"depth": 12, "embed_dim": 384, "num_heads": 6},
    "base": {"depth": 12, "embed_dim": 768, "num_heads": 12},
    "large": {"depth": 24, "embed_dim": 1024, "num_heads": 16},
}


@pytest.mark.parametrize("case", ["diffrate_step", "diffrate_step_prune_only"])
def test_a_step_equals_the_reference(case):
    meta, tensors = golden(case)
    kept = [meta["settings"][f"{name}_kept"] - 1 for name in ("prune", "merge")]
    grouping = prune_and_merge(tensors["input.x"], tensors["input.class_attention"], *kept, 1)
    order = tensors["output.order"][:, : kept[0] + 1]
    assert torch.equal(torch.cat([grouping.keep, grouping.src], dim=1), order)
    if kept[0] > kept[1]:
        share = grouping.absorbed_share
        torch.testing.assert_close(share, tensors["output.similarity"], **CLOSE)
    size = tensors["input.size"][..., 0]
    tokens = Tokens(tensors["input.x"], prefix=1, grid=(5, 5), size=size)
    reduced = tokens.apply_grouping(grouping, track_size=True)
    torch.testing.assert_close(reduced.x, tensors["output.x"], **CLOSE)
    torch.testing.assert_close(reduced.size, tensors["output.size"][..., 0], **CLOSE)


@torch.no_grad()
def test_a_layer_by_hand():
    """The class attention of the layer decides; the class token absorbs nothing."""
    model = td.wrap(tiny_vit(depth=1), reduce=td.PruneMerge(r=6, prune_share=0.5)).eval()
    plain = td.wrap(model.vit).eval()
    block, entered = model.vit.blocks[0], model.anatomy.embed(images()).x
    normed = block.norm1(entered)
    qkv = block.attn.qkv(normed).view(2, 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
    attention = (qkv[0] @ qkv[1].transpose(-1, -2) * 16**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    x = entered + block.attn(normed)
    order = attention.argsort(dim=1, descending=True) + 1
    wanted = []
    for image in range(2):
        stay, merge = order[image, :58], order[image, 58:61]
        similarity = F.cosine_similarity(x[image, merge, None], x[image, None, stay], dim=-1)
        groups = {int(token): [int(token)] for token in stay}
        for token, partner in zip(merge, similarity.argmax(1), strict=True):
            groups[int(stay[partner])].append(int(token))
        rows = [
            x[image, :1],
            *(x[image, [*group]].mean(0, keepdim=True) for group in groups.values()),
        ]
        wanted.append(torch.cat(rows))
    merged = torch.stack(wanted)
    expected = merged + block.mlp(block.norm2(merged))
    (step,) = model.steps(images())
    torch.testing.assert_close(step.tokens.x, expected, atol=1e-5, rtol=1e-5)
    assert len(list(plain.steps(images()))) == 1


@given(
    patches=st.integers(2, 30),
    prefix=st.integers(0, 3),
    kept=st.data(),
)
def test_as_many_stay_merge_and_are_dropped_as_asked(patches, prefix, kept):
    merge_kept = kept.draw(st.integers(1, patches))
    prune_kept = kept.draw(st.integers(merge_kept, patches))
    draw = torch.Generator().manual_seed(patches)
    x = torch.randn(2, prefix + patches, 6, generator=draw)
    scores = torch.rand(2, patches, generator=draw)
    grouping = prune_and_merge(x, scores, prune_kept, merge_kept, prefix)
    if merge_kept == patches:
        assert grouping is None
        return
    assert grouping.keep.shape[1] == prefix + merge_kept
    assert grouping.src.shape[1] == prune_kept - merge_kept
    assert (grouping.dst >= prefix).all()
    assert (grouping.index[:, :prefix] == torch.arange(prefix)).all()
    dropped = (grouping.index < 0).sum(1)
    assert (dropped == patches - prune_kept).all()
    if patches > prune_kept:
        at = grouping.index[:, prefix:]
        worst_kept = scores.masked_fill(at < 0, 2).amin(1)
        assert (scores.masked_fill(at >= 0, -1).amax(1) <= worst_kept).all()


def test_a_token_that_is_unlike_all_others_adds_no_size():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]])
    grouping = prune_and_merge(x, torch.tensor([[0.5, 0.4, 0.1]]), 3, 2, 0)
    sizes = grouping.sizes(torch.ones(1, 3))
    assert sizes.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "gmacs"), [(name, cost) for name, costs in PUBLISHED.items() for cost in costs]
)
def test_published_schedules_cost_what_their_authors_count(name, gmacs):
    """Their formula counts the products of each layer, of the patch embedding and the head."""
    shape = SHAPES[name.split("_")[1]]
    depth, dim = shape["depth"], shape["embed_dim"]
    method = td.PruneMerge.published(name, gmacs)
    with torch.device("meta"):
        model = td.wrap(timm.create_model("vit_base_patch16_224", **shape), reduce=method)
    counted, now = 197 * dim * 768 + 1000 * dim, 197
    for removed in method.r:
        counted += 4 * now * dim**2 + 2 * now**2 * dim
        now -= removed
        counted += 8 * now * dim**2
    cost = model.cost()
    assert cost.gmacs == pytest.approx(counted / 1e9, rel=0.01)
    assert cost.gmacs == pytest.approx(gmacs, rel=0.07, abs=0.07)  # printed with one digit
    assert len(cost.tokens_per_layer) == depth
    assert cost.tokens_per_layer[-1] == now


def test_lists_of_kept_tokens_become_removed_ones():
    found = td.PruneMerge.from_kept([17, 15, 14, 9], [17, 12, 12, 9])
    assert (list(found.r), list(found.pruned)) == ([0, 5, 0, 3], [0, 2, 0, 3])
    for lists in (([17, 15], [16]), ([17, 15], [16, 1])):
        with pytest.raises(ValueError, match="one number of at least 2 for each layer, got"):
            td.PruneMerge.from_kept(*lists)


def test_other_schedules_drop_the_same_share_in_each_layer():
    method = td.PruneMerge(r=[0, 5, 3], pruned=[0, 2, 3]).with_schedules([[4, 10, 3, 2]])
    reducer = td.wrap(tiny_vit(), reduce=method).reducer
    # A layer that removed nothing drops 5 of 8, the share of all layers together.
    assert [reducer.num_pruned(*each) for each in ((1, 4), (2, 10), (3, 3), (4, 2))] == [2, 4, 3, 1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_as_a_degree_is_the_same(name):
    method = td.PruneMerge.published(name, max(PUBLISHED[name]))
    with torch.device("meta"):
        shape = SHAPES[name.split("_")[1]]
        vit = timm.create_model("vit_base_patch16_224", **shape)
    reducer = td.wrap(vit, reduce=method.with_schedules([method.r])).reducer
    assert reducer.schedules[1] == list(method.r)
    dropped = [reducer.num_pruned(layer, r) for layer, r in enumerate(method.r, start=1)]
    assert dropped == list(method.pruned)


@torch.no_grad()
def test_the_share_decides_what_is_lost():
    for share, dropped in ((0.0, 0), (0.5, 6), ([0.0, 0.5, 1.0], 6), ([0.25], 1), (1.0, 12)):
        model = td.wrap(tiny_vit(depth=3), reduce=td.PruneMerge(r=4, prune_share=share)).eval()
        *_, last = model.steps(images(), track=True)
        assert ((last.tokens.origin < 0).sum(1) == dropped).all()
        assert last.tokens.x.shape[1] == 65 - 12


def test_a_backbone_without_a_class_token_needs_the_mean():
    vit = perturbed(tiny_vit(class_token=False, global_pool="avg"))
    with pytest.raises(ValueError, match="score='class' needs a backbone with a class token"):
        td.wrap(vit, reduce=td.PruneMerge())
    model = td.wrap(vit, reduce=td.PruneMerge(score="mean")).eval()
    assert model(images()).shape == (2, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "r must be an integer of at least 0"),
        ({"prune_share": 1.5}, r"prune_share must lie in \[0, 1\], or be a list .*, got 1.5"),
        ({"prune_share": [0.5, -1]}, r"one per layer, got \[0.5, -1\]"),
        ({"prune_share": []}, r"one per layer, got \[\]"),
        ({"pruned": [1]}, "pruned must be a list of integers, and so must r"),
        ({"pruned": 1, "r": [2]}, "pruned must be a list of integers"),
        (
            {"pruned": [3], "r": [2]},
            r"pruned must be at most r in each layer, got \[3\] and r=\[2\]",
        ),
        ({"score": "best"}, "score must be one of class, mean"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        td.PruneMerge(**settings)


def test_shares_of_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match=r"prune_share must have at most 4 entries .*, got 5"):
        td.wrap(tiny_vit(), reduce=td.PruneMerge(prune_share=[0.5] * 5))


def test_unknown_schedules_are_named():
    with pytest.raises(ValueError, match="model must be one of deit_tiny, deit_small"):
        td.PruneMerge.published("deit_huge", 2.3)
    with pytest.raises(ValueError, match=r"gmacs must be one of 2.3, 2.5, .*, got 2.4"):
        td.PruneMerge.published("deit_small", 2.4)
