"""Runs made from exported ONNX files of whole models: an encoder with a decoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from examples import images
from exported_dinov2 import BACKBONE, DECODER, Encoder, Saliency, change, export, initializer, run
from onnx import helper
from PIL import Image

import tokendial as td
from tokendial.backbones import fingerprint
from tokendial.runs import Run

SIZE = (32, 20)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("exported") / "saliency.onnx", Saliency(padding=1))


@pytest.fixture
def recipe(tmp_path):
    """A recipe like real/focus, for the tiny model at another size than the file's."""
    content = {
        "model": {"name": BACKBONE.name, "img_size": list(SIZE), "args": BACKBONE.args},
        "reduce": {"name": "tome", "r": 4},
        "adapt": {"name": "linear"},
        "decode": {"name": "upconv", "channels": list(DECODER.channels)},
        "data": {"name": "pairs", "root": "nowhere"},
        "train": {"degree": 0},
    }
    path = tmp_path / "focus.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def convert(cli, path, recipe, *overrides):
    out = recipe.parent / "run"
    code, printed, err = cli(
        "weights", "convert", path, *overrides, "--recipe", recipe, "--out", out
    )
    return code, printed, err, out


@torch.no_grad()
def test_the_run_gives_the_probabilities_of_the_file(exported, recipe, cli):
    code, printed, err, out = convert(cli, exported, recipe)
    assert (code, err) == (0, "")
    assert printed == f"wrote {out}: the exported model of {recipe}\n"
    model = Run(out).model()
    assert (model.degree, model.degrees[:3]) == (0, (0, 1, 2))
    found = F.interpolate(model(images(2, *SIZE)), SIZE, mode="bilinear").sigmoid()
    expected = run(exported, images(2, *SIZE))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01


def test_the_run_recognises_adapters_that_were_trained_on_the_converted_weights(
    exported, recipe, cli, tmp_path
):
    out = convert(cli, exported, recipe)[-1]
    weights = td.convert_weights(exported, BACKBONE).save(tmp_path / "weights.safetensors")
    vit = replace(BACKBONE, weights=str(weights), args=BACKBONE.args | {"img_size": SIZE})
    assert Run(out).model().fingerprint == fingerprint(vit.with_head(0).create())


def test_the_run_predicts_at_any_degree(exported, recipe, cli, tmp_path):
    out = convert(cli, exported, recipe)[-1]
    Image.new("RGB", (60, 33), "red").save(tmp_path / "image.png")
    code, _, err = cli(
        "predict", out, tmp_path / "image.png", "--out", tmp_path / "masks", "--degree", 3
    )
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "masks" / "image.png") as mask:
        assert mask.size == (60, 33)


def without_bias(graph):
    """A convolution without a bias, as before a BatchNorm."""
    up = next(node for node in graph.node if node.op_type == "ConvTranspose")
    del up.input[2:]


@torch.no_grad()
def test_a_convolution_without_a_bias_has_the_bias_zero(exported, recipe, cli, tmp_path):
    path = tmp_path / "saliency.onnx"
    path.write_bytes(exported.read_bytes())
    change(path, without_bias)
    out = convert(cli, path, recipe)[-1]
    found = Run(out).model()(images(2, *SIZE))
    probabilities = F.interpolate(found, SIZE, mode="bilinear").sigmoid()
    torch.testing.assert_close(probabilities, run(path, images(2, *SIZE)), atol=1e-5, rtol=1e-5)


def set_attribute(op_type, name, value):
    def edit(graph):
        node = next(node for node in graph.node if node.op_type == op_type)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def with_another_activation(graph):
    next(node for node in graph.node if node.op_type == "Relu").op_type = "Elu"


def not_finite(graph):
    initializer(graph, "decoder.6.bias").raw_data = b"\x00\x00\xc0\x7f"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_attribute("ConvTranspose", "strides", [1, 1]), "transposed convolution 1 must follow"),
        (set_attribute("ConvTranspose", "output_padding", [1, 1]), "convolution 1 must follow"),
        (set_attribute("BatchNormalization", "epsilon", 1e-3), "epsilon of BatchNorm 1 must be"),
        (with_another_activation, "must be read by one Relu, found 0"),
        (not_finite, "predict.bias must hold finite numbers, got NaN"),
    ],
)
def test_other_decoders_are_refused_in_one_line(exported, recipe, cli, tmp_path, edit, message):
    path = tmp_path / "saliency.onnx"
    path.write_bytes(exported.read_bytes())
    code, out, err, folder = convert(cli, change(path, edit), recipe)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}")
    assert message in err
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    "model", [Encoder(), Saliency(reads="block", padding=1)], ids=["none", "of a block"]
)
def test_the_decoder_must_read_the_patches_after_the_final_norm(recipe, cli, tmp_path, model):
    path = export(tmp_path / "saliency.onnx", model)
    code, _, err, _ = convert(cli, path, recipe)
    assert code == 2
    assert "no transposed convolution reads the patches after the final norm" in err


def test_the_recipe_must_have_the_decoder_of_the_file(exported, recipe, cli):
    code, _, err, _ = convert(cli, exported, recipe, "decode.channels=[12,9]")
    assert code == 2
    assert err == (
        f"error: decode must be that of {exported}: UpConvDecoder(num_classes=1, "
        "channels=(12, 8)), got UpConvDecoder(num_classes=1, channels=(12, 9)).\n"
    )
