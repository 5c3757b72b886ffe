import io
from base64 import b64decode

import numpy as np
import pytest
import torch
from examples import images, tiny_vit
from PIL import Image

import tokendial as td
from tokendial.serve.workers.token_view import model_input_png, token_view
from tokendial.show import token_maps


@pytest.fixture(scope="module")
def model():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=[8, 0, 16, 0]), adapt=td.LoRA(rank=2))
    model.add_adapter("pets", td.LoRA(rank=2), num_classes=3)
    return model


def test_the_view_is_that_of_the_token_maps(model):
    model.set_degree(1)
    maps = token_maps(model, images(1)[0])
    view = token_view(model, images(1)[0], 1)
    assert (view.degree, view.rows, view.columns) == (1, 8, 8)
    assert (view.width, view.height) == (32, 32)
    assert [layer.layer for layer in view.layers] == [1, 2, 3, 4]
    assert [layer.tokens for layer in view.layers] == [57, 57, 41, 41]
    origins = [np.reshape(layer.origin, (8, 8)) for layer in view.layers]
    assert all((a == b).all() for a, b in zip(origins, maps.origin, strict=True))


def test_degree_0_keeps_every_patch_by_itself(model):
    view = token_view(model, images(1)[0], 0)
    assert all(layer.tokens == 65 for layer in view.layers)
    assert all(len(set(layer.origin)) == 64 for layer in view.layers)


def test_patches_without_a_token_are_marked():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=[0.5], layers=(2,), rest="drop"))
    view = token_view(model, images(1)[0], 1)
    assert [layer.origin.count(-1) for layer in view.layers] == [0, 32, 32, 32]


def test_the_picture_is_what_the_model_sees(model):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in model.anatomy.statistics)
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    seen = Image.open(io.BytesIO(b64decode(model_input_png(model, image))))
    assert (np.asarray(seen) == pixels).all()


def test_another_adapter_is_followed_and_the_model_left_as_it_was(model):
    model.set_degree(1)
    before = model(images(1))
    token_view(model, images(1)[0], 0, adapter="pets")
    assert (model.degree, model.active_adapter) == (1, "default")
    assert torch.equal(model(images(1)), before)


@pytest.mark.parametrize("wrong", [{"degree": 9}, {"degree": 0, "adapter": "cars"}])
def test_an_unknown_degree_or_adapter_changes_nothing(model, wrong):
    model.set_degree(1)
    with pytest.raises(ValueError, match="must be"):
        token_view(model, images(1)[0], **wrong)
    assert (model.degree, model.active_adapter) == (1, "default")
