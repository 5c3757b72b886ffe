"""InWindows: a method runs on each window, and nothing else of the model notices."""

import pytest
import timm
import torch
from examples import images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td

METHODS = {
    "tome": td.ToMe(r=3),
    "pitome": td.PiToMe(r=3),
    "evit": td.EViT(r=3),
    "drop": td.EViT(r=3, rest="drop"),
    "prune_merge": td.PruneMerge(r=3),
    "dynamicvit": td.DynamicViT(keep_rate=0.6, layers=(2, 4)),
    "ffn_merge": td.FFNMerge(r=4, step=4),
}


def in_windows(method, vit=None, windows=(2, 2)):
    torch.manual_seed(0)
    reduce = td.InWindows(reduce=METHODS[method], windows=windows)
    model = td.wrap(vit or tiny_vit(), reduce=reduce).eval()
    perturbed(model.reducer)
    return model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_window_keeps_as_many_tokens_and_none_merge_across(method):
    model = in_windows(method)
    positions = torch.arange(64).view(8, 8)
    window = (positions // 8 // 4) * 2 + positions % 8 // 4
    for step in model.steps(images(), track=True):
        origin = step.tokens.origin[:, 1:]
        for image in origin:
            held = image >= 0
            tokens = [
                set(image[(window.flatten() == number) & held].tolist()) for number in range(4)
            ]
            assert len({len(of_window) for of_window in tokens}) == 1
            assert len(set.union(*tokens)) == sum(map(len, tokens))


@pytest.mark.parametrize(("windows", "patches"), [((4, 4), 4), ((4, 2), 8), ((8, 4), 2)])
@torch.no_grad()
def test_no_token_holds_more_patches_than_a_window_has(windows, patches):
    """Equal images merge all that they may: without windows one token would hold most of them."""

    def largest(reduce):
        model = td.wrap(tiny_vit(), reduce=reduce).eval()
        sizes = [step.tokens.size for step in model.steps(torch.zeros_like(images()))]
        return int(sizes[-1][:, 1:].max())

    assert largest(td.ToMe(r=16)) > 8
    assert largest(td.InWindows(reduce=td.ToMe(r=1), windows=windows)) <= patches


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_one_window_is_the_method_itself(method):
    model, plain = in_windows(method, windows=(1, 1)), td.wrap(tiny_vit(), reduce=METHODS[method])
    plain.reducer.load_state_dict(model.reducer.inner.state_dict())
    torch.testing.assert_close(model(images()), plain.eval()(images()))


@torch.no_grad()
def test_windows_of_equal_images_are_images():
    """Without attention across, a window of an image of four tiles merges as a tile alone does."""
    vit = tiny_vit(depth=1, pos_embed="none", img_size=32)
    small = tiny_vit(depth=1, pos_embed="none", img_size=16)
    small.load_state_dict(vit.state_dict())
    tile = images(1, 16, 16)
    model = td.wrap(vit, reduce=td.InWindows(reduce=td.ToMe(r=4))).eval()
    alone = td.wrap(small, reduce=td.ToMe(r=4)).eval()
    (whole,), (one,) = (
        list(m.steps(x, track=True)) for m, x in ((model, tile.tile(1, 1, 2, 2)), (alone, tile))
    )
    # Attention over four copies of the same keys is attention over one, but for the class token.
    origin = whole.tokens.origin[0, 1:].view(8, 8)[:4, :4] - 1
    expected = one.tokens.origin[0, 1:].view(4, 4) - 1
    assert torch.equal(origin, expected)


@pytest.mark.parametrize("method", ["tome", "drop", "dynamicvit", "ffn_merge"])
@torch.no_grad()
def test_maps_are_restored_in_their_places(method):
    """Where few tokens go, the map is near that of the whole model; shuffled ones would not be."""
    model = in_windows(method)
    whole = td.wrap(model.vit).eval()
    reduced, full = (m.feature_map(images()).flatten(2) for m in (model, whole))
    near = torch.nn.functional.cosine_similarity(reduced, full, dim=1).mean()
    shuffled = torch.nn.functional.cosine_similarity(
        reduced, full[..., torch.randperm(64)], dim=1
    ).mean()
    assert near > shuffled + 0.2


@torch.no_grad()
def test_rotary_positions_follow_the_patches():
    """With wrong positions even a mild reduction would change the features beyond recognition."""
    vit, size = backbone("dinov3")
    model = in_windows("tome", vit, windows=(1, 2))
    model.set_degree(0)
    full = model(images(2, *size))
    model.set_degree(1)
    assert torch.nn.functional.cosine_similarity(model(images(2, *size)), full).min() > 0.9


IN_REGIONS = {
    "tome": td.ToMe(r=12),
    "tome similarity": td.ToMe(r=[[0.2, 0.1, 0.3]], sizes="similarity"),
    "pitome": td.PiToMe(r=12),
    "evit": td.EViT(r=12),
    "drop": td.EViT(r=12, rest="drop"),
    "prune_merge": td.PruneMerge(r=12),
}
# A frame, a disc in it that is one patch wide in places, and a single patch.
SHAPES = [[int((row - 3) ** 2 + (column - 4) ** 2 < 7) for column in range(8)] for row in range(8)]
SHAPES[7][7] = 5
QUARTERS = [[2 * (row // 4) + column // 4 for column in range(8)] for row in range(8)]


@pytest.mark.parametrize("method", IN_REGIONS)
@torch.no_grad()
def test_tokens_of_different_regions_never_merge_and_each_loses_its_share(method):
    reduce = td.InWindows(reduce=IN_REGIONS[method], regions=SHAPES)
    model = td.wrap(tiny_vit(), reduce=reduce).eval()
    region = torch.tensor(SHAPES).flatten()
    counts = [int((region == number).sum()) for number in (0, 1, 5)]
    plain = td.wrap(tiny_vit(), reduce=IN_REGIONS[method]).eval()
    whole = [step.tokens.x.shape[1] for step in plain.steps(images())]
    for step, of_whole in zip(model.steps(images(), track=True), whole, strict=True):
        assert step.tokens.x.shape[1] == pytest.approx(of_whole, abs=6)
        for image in step.tokens.origin[:, 1:]:
            tokens = [{*image[(region == n) & (image >= 0)].tolist()} for n in (0, 1, 5)]
            assert len(set.union(*tokens)) == sum(map(len, tokens))
            assert image[-1] == step.tokens.x.shape[1] - 1  # a patch alone has no partner
            for count, left in zip(counts[:2], tokens, strict=False):
                kept = (step.tokens.x.shape[1] - 1) / 64
                if method not in ("drop", "prune_merge"):  # whose dropped patches have no token
                    assert len(left) == pytest.approx(kept * count, abs=4)


@pytest.mark.parametrize("method", IN_REGIONS)
@torch.no_grad()
def test_one_region_is_the_method_itself_and_quarters_are_windows(method):
    def logits(reduce):
        return td.wrap(tiny_vit(), reduce=reduce).eval()(images())

    whole = td.InWindows(reduce=IN_REGIONS[method], regions=[[7] * 8] * 8)
    torch.testing.assert_close(logits(whole), logits(IN_REGIONS[method]))
    if method in METHODS:
        quarters = td.InWindows(reduce=IN_REGIONS[method], regions=QUARTERS)
        windows = td.InWindows(reduce=METHODS[method])
        torch.testing.assert_close(logits(quarters), logits(windows))


@torch.no_grad()
def test_regions_compile_as_one_graph_and_keep_rotary_positions():
    vit, size = backbone("dinov3")
    rows, columns = td.wrap(vit).feature_map(images(1, *size)).shape[2:]
    regions = [[int(column > row) for column in range(columns)] for row in range(rows)]
    model = td.wrap(vit, reduce=td.InWindows(reduce=td.ToMe(r=2), regions=regions)).eval()
    reduced = model(images(2, *size))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(2, *size)), reduced)
    model.set_degree(0)
    full = model(images(2, *size))
    assert not torch.equal(reduced, full)
    assert torch.nn.functional.cosine_similarity(reduced, full).min() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"regions": [[0, 1], [0]]},
            r"regions must be rows of as many integers each, .* \[\[0, 1\]",
        ),
        ({"regions": [[0.5]]}, "regions must be rows of as many integers"),
        ({"regions": 3}, "regions must be rows of as many integers"),
        ({"regions": SHAPES, "windows": (1, 2)}, "set windows or regions, not both"),
        ({"regions": [[0] * 7] * 7}, "regions must number each of the 64 patches, got 7 x 7"),
        ({"regions": [[0] * 16] * 4}, "regions must have the image's 8 x 8 patches, got 4 x 16"),
        ({"regions": SHAPES, "reduce": td.EViT(keep_rate=0.7)}, "removes tokens by r, got EViT"),
        ({"regions": SHAPES, "reduce": td.FFNMerge(r=4, step=4)}, "removes tokens by r, got FFNM"),
        ({"regions": SHAPES, "reduce": td.LearntMetric()}, "without weights, got LearntMetric"),
    ],
)
def test_regions_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(tiny_vit(), reduce=td.InWindows(**{"reduce": td.ToMe(r=2), **settings}))(images())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="windows must be two integers of at least 1, got 2"):
        td.InWindows(reduce=td.ToMe(), windows=2)
    with pytest.raises(ValueError, match=r"windows must be two .* got \(0, 1\)"):
        td.InWindows(reduce=td.ToMe(), windows=(0, 1))
    with pytest.raises(ValueError, match="reduce must be another reduction method"):
        td.InWindows(reduce=td.InWindows(reduce=td.ToMe()))
    with pytest.raises(ValueError, match="leave in_windows out"):
        td.InWindows(reduce=td.DAR())
    model = td.wrap(tiny_vit(), reduce=td.InWindows(reduce=td.ToMe(r=2), windows=(3, 2)))
    with pytest.raises(ValueError, match="windows must divide the 8 x 8 patches, got 3 x 2"):
        model(images())
    clips = timm.create_model(
        "videomae_small_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=3
    )
    with pytest.raises(ValueError, match="in_windows is for images"):
        td.wrap(clips, reduce=td.InWindows(reduce=td.ToMe(r=2)))
