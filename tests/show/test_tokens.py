import numpy as np
import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from tokendial.show import token_maps
from tokendial.show.token_figures import token_figure
from tokendial.show.tokens import paint_tokens


def test_maps_follow_the_tokens_to_the_end():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8))
    maps = token_maps(model, images(1)[0])
    assert maps.num_tokens == (57, 49, 41, 33)
    assert [len(np.unique(origin)) for origin in maps.origin] == [56, 48, 40, 32]
    assert maps.origin[0].shape == (8, 8)


@torch.no_grad()
def test_class_attention_is_that_of_the_last_layer_shared_among_patches():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8))
    maps = token_maps(model, images(1)[0])
    *_, last = model.steps(images(1), needs=frozenset({"class_attention"}))
    to_patches = last.attended.class_attention[0, 1:].sum().item()
    np.testing.assert_allclose(maps.class_attention.sum(), to_patches, rtol=1e-5)


def test_class_attention_of_dropped_patches_is_zero():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=[0.5], layers=(2,), rest="drop"))
    maps = token_maps(model, images(1)[0])
    assert ((maps.class_attention == 0) == (maps.origin[1] < 0)).all()


@pytest.mark.parametrize(
    ("reduce", "adapt"),
    [
        (td.DynamicViT(keep_rate=0.5, layers=(2, 4)), None),
        (td.ToMe(r=8), td.VPT(prompts=3)),
        (td.EViT(keep_rate=0.5, layers=(2,)), td.VPT(prompts=3, deep=False)),
    ],
)
@torch.no_grad()
def test_class_attention_falls_on_the_patches_of_the_tokens_that_were_seen(reduce, adapt):
    model = td.wrap(tiny_vit(), reduce=reduce, adapt=adapt).eval()
    maps = token_maps(model, images(1)[0])
    *_, last = model.steps(images(1), track=True, needs=frozenset({"class_attention"}))
    attention, prefix = last.attended.class_attention[0], last.entered.prefix
    np.testing.assert_allclose(maps.class_attention.sum(), attention[prefix:].sum(), rtol=1e-5)
    held = last.entered.origin[0, 1:]
    assert torch.equal(torch.from_numpy(maps.class_attention == 0).flatten(), held < 0)


def test_a_model_of_one_layer_has_class_attention_too():
    maps = token_maps(td.wrap(tiny_vit(depth=1)), images(1)[0])
    assert maps.class_attention.shape == (8, 8)


def test_a_model_without_class_token_has_no_class_attention():
    model = td.wrap(tiny_vit(class_token=False, global_pool="avg"), reduce=td.ToMe(r=8))
    assert token_maps(model, images(1)[0]).class_attention is None


def test_merged_tokens_are_coloured_dropped_ones_dark_and_others_unchanged():
    pixels = np.full((8, 16, 3), 100, np.uint8)
    origin = np.array([[5, 5, -1, 6], [7, 5, 6, 6]])
    painted = paint_tokens(pixels, origin)
    one, other = painted[1, 1], painted[6, 10]
    assert (
        len({*map(tuple, (one, other, painted[1, 13]))}) == 2
    )  # each merged token has its own colour
    for colour in (one, other):  # on a grey image, too
        assert int(colour.max()) - int(colour.min()) > 50
    assert painted[5, 1].tolist() == [100] * 3  # a token of its own
    assert painted[1, 9].tolist() == [20] * 3  # dropped
    assert painted[1, 7].tolist() == [255] * 3  # outline between two tokens
    assert painted[5, 3].tolist() == [255] * 3
    assert painted[1, 3].tolist() == one.tolist()  # no outline within a token
    assert painted[1, 15].tolist() != [255] * 3  # no outline at the border of the image


def test_tokens_that_the_ffn_skips_are_shown_as_missing():
    model = td.wrap(tiny_vit(), reduce=td.DyT(target_ratio=0.25, selection="topk"))
    maps = token_maps(model, images(1)[0])
    assert maps.num_tokens == (17,) * 4
    assert maps.reduces == (True,) * 4
    assert [(origin < 0).sum() for origin in maps.origin] == [48] * 4
    figure = token_figure(model, images(1)[0], np.zeros((32, 32, 3), np.uint8))
    assert len(figure.axes) == 6


def test_the_figure_has_a_panel_for_every_layer_that_reduces():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=0.5, layers=(2, 4)))
    figure = token_figure(model, images(1)[0], np.zeros((32, 32, 3), np.uint8))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "what the model sees",
        "layer 2: 34 tokens",
        "layer 4: 19 tokens",
        "class attention, last layer",
    ]


def test_at_most_five_layers_of_a_deep_model_are_shown():
    model = td.wrap(tiny_vit(depth=9), reduce=td.ToMe(r=3))
    figure = token_figure(model, images(1)[0], np.zeros((32, 32, 3), np.uint8))
    assert len(figure.axes) == 1 + 5 + 1
