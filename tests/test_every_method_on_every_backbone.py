"""Each reduction method on each kind of backbone, on images that are square and that are not.

Each docstring lists defects that the test catches; each of them was put into the code once to see
the test fail.
"""

import dataclasses
import itertools

import pytest
import torch
from examples import REDUCERS, images
from zoo import EVERY, KINDS, backbone

import tokendial as td


def fitting(reduce, vit):
    """The example, with layers that a model of two blocks has and a score that it can compute."""
    changes = {}
    if hasattr(reduce, "layers"):
        changes["layers"] = (1, 2)
    if getattr(reduce, "score", None) == "class" and not td.wrap(vit).anatomy.shape.has_class_token:
        changes["score"] = "mean"
    if isinstance(
        reduce, td.ToMe | td.PiToMe | td.PruneMerge | td.LearntMetric | td.PYRA | td.FFNMerge
    ):
        changes["r"] = 2
    return dataclasses.replace(reduce, **changes)


VARIANTS = {
    "evit shift": td.EViT(layers=(1, 2), score="shift"),
    "prune_merge shift": td.PruneMerge(score="shift"),
    "tome similarity": td.ToMe(sizes="similarity"),
}


def model_of(method, name, square):
    vit, size = backbone(name, square=square)
    torch.manual_seed(0)
    model = td.wrap(vit, reduce=fitting((REDUCERS | VARIANTS)[method], vit)).eval()
    return model, images(3, *size)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("method", "square"),
    [
        # Images have one time step, so frame_by_frame would run its inner method unchanged.
        *itertools.product(sorted({*REDUCERS} - {"frame_by_frame"}), [True, False]),
        *itertools.product(VARIANTS, [False]),
    ],
)
@torch.no_grad()
def test_logits_and_feature_maps(method, name, square):
    """Catches: rows and columns of the grid that are swapped; a method that reduces nothing; images
    of a batch that are mixed.
    """
    model, pictures = model_of(method, name, square)
    logits = model(pictures)
    assert logits.shape[0] == 3
    assert logits.isfinite().all()
    torch.testing.assert_close(model(pictures[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    tokens = model.anatomy.embed(pictures)
    shape = (3, tokens.x.shape[-1], *tokens.grid)
    for layer in (1, None):
        feature_map = model.feature_map(pictures, layer)
        assert feature_map.shape == shape
        assert feature_map.isfinite().all()
    assert ((logits - logits_at_degree_0(model, pictures)).abs().amax(dim=1) > 1e-6).all()
    assert model.cost().macs < model.cost(0).macs


def logits_at_degree_0(model, pictures):
    degree = model.degree
    model.set_degree(0)
    logits = model(pictures)
    model.set_degree(degree)
    return logits


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_the_largest_degree_of_the_dial_runs(name):
    """Catches: a map from positions to tokens that is not updated."""
    model, pictures = model_of("tome", name, square=False)
    model.set_degree(model.degrees[-1])
    assert model(pictures).isfinite().all()
    assert model.feature_map(pictures).shape[-2:] == model.anatomy.embed(pictures).grid


@pytest.mark.parametrize(
    "adapt", [td.AdaptFormer(dim=4), td.DARAdapter(dims=(4, 4)), td.LinearProbe()]
)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_model_of_each_kind_is_saved_and_loaded(name, adapt, tmp_path):
    """Catches: weights of the adapter or of the head that are not saved."""
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.FFNMerge(r=5), adapt=adapt)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05  # a fresh adapter adds zeros, whatever is saved of it
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=backbone(name)[0])
    assert torch.equal(loaded(images(2, *size)), model.eval()(images(2, *size)))


@torch.no_grad()
def test_a_model_of_transformers_is_built_again_from_its_folder(tmp_path):
    vit, size = backbone("hf vit")
    vit.save_pretrained(tmp_path / "vit")
    vit = type(vit).from_pretrained(tmp_path / "vit")
    targets = ("q_proj", "v_proj")
    model = td.wrap(vit, reduce=td.ToMe(r=3), adapt=td.LoRA(rank=2, target_modules=targets))
    model.save_pretrained(tmp_path / "out")
    loaded = td.load(tmp_path / "out")
    assert torch.equal(loaded(images(2, *size)), model.eval()(images(2, *size)))
    assert loaded.backbone.name == "transformers.ViTForImageClassification"


@torch.no_grad()
def test_a_model_of_transformers_with_random_weights_is_saved_whole(tmp_path):
    vit, size = backbone("hf dinov2 registers")
    model = td.wrap(vit, reduce=td.ToMe(r=3))
    model.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images(2, *size)), model.eval()(images(2, *size)))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("transformers.Nothing", None, "'transformers.Nothing' is not a class of transformers"),
        ("transformers.ViTModel", "/no/such", "model.weights '/no/such':"),
        (
            "transformers.BertModel",
            None,
            "not a class of transformers that is supported: one of ViTModel",
        ),
    ],
)
def test_other_models_of_transformers_raise(name, weights, message):
    args = {"num_hidden_layers": 1, "hidden_size": 12, "intermediate_size": 12}
    with pytest.raises(ValueError, match=message):
        td.Backbone(name=name, weights=weights, args=args).create()
