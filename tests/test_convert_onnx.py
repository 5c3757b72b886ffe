"""Dinov2 encoders in exported ONNX files: equal to the file in onnxruntime, and what is refused."""

from dataclasses import replace

import onnx
import pytest
import torch
from examples import images
from exported_dinov2 import (
    BACKBONE,
    SIDE,
    WIDTH,
    Encoder,
    Saliency,
    as_the_real_file,
    change,
    export,
    initializer,
    run,
)
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open

import tokendial as td
from tokendial import extras
from tokendial.backbones import load_weights

OTHER = (32, 20)
SWIGLU = replace(
    BACKBONE,
    name="vit_giant_patch14_dinov2",
    args=BACKBONE.args | {"mlp_ratio": 2 * 48 / WIDTH},
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file as transformers 5 gives it."""
    return export(tmp_path_factory.mktemp("exported") / "encoder.onnx", Encoder())


@pytest.fixture
def copy(exported, tmp_path):
    """The same file, to be changed."""
    path = tmp_path / "changed.onnx"
    path.write_bytes(exported.read_bytes())
    return path


def features(path, backbone, size):
    """All tokens of the converted file, whose positions are resized when it is loaded."""
    saved = td.convert_weights(path, backbone).save(path.with_suffix(".safetensors"))
    sized = replace(backbone, weights=str(saved), args=backbone.args | {"img_size": size})
    return sized.with_head(0).create().eval().forward_features(images(2, *size))


@pytest.mark.parametrize("size", [(SIDE, SIDE), OTHER])
@torch.no_grad()
def test_features_equal_those_of_the_file_at_any_size(exported, size):
    expected = run(exported, images(2, *size))
    torch.testing.assert_close(features(exported, BACKBONE, size), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_belong_to_the_biases_that_they_stand_before(tmp_path):
    """Numbered in the order of the real file: keys, values, queries."""
    model = Encoder()
    path = as_the_real_file(export(tmp_path / "encoder.onnx", model), model)
    stored = [v.name for v in onnx.load(path).graph.initializer if "::MatMul" in v.name]
    first = torch.tensor(numpy_helper.to_array(initializer(onnx.load(path).graph, stored[0])))
    attention = model.backbone.encoder.layer[0].attention
    assert torch.equal(first.T, attention.k_proj.weight)
    expected = run(path, images(2, *OTHER))
    torch.testing.assert_close(features(path, BACKBONE, OTHER), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gated_ffns_are_read_too(tmp_path):
    path = export(tmp_path / "encoder.onnx", Encoder(use_swiglu_ffn=True, mlp_ratio=4))
    expected = run(path, images(2, *OTHER))
    torch.testing.assert_close(features(path, SWIGLU, OTHER), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_tensors_that_are_stored_once_are_read_under_all_their_names(tmp_path):
    path = export(tmp_path / "encoder.onnx", Encoder(), fresh=True)
    names = {value.name for value in onnx.load(path).graph.initializer}
    assert "backbone.encoder.layer.1.norm1.weight" not in names
    expected = run(path, images(2, *OTHER))
    torch.testing.assert_close(features(path, BACKBONE, OTHER), expected, atol=1e-5, rtol=1e-5)


def to_constants(graph):
    """Make nodes of the two stored positions."""
    for stored in [v for v in graph.initializer if v.dims[:1] == [1] and "::" in v.name]:
        graph.initializer.remove(stored)
        graph.node.insert(0, helper.make_node("Constant", [], [stored.name], value=stored))


def to_grid(graph):
    """Store the positions as a grid with the channels first, as exporters may fold them."""
    positions = initializer(graph, r"::Reshape_\d+")
    (reshape,) = (node for node in graph.node if positions.name in node.input)
    (transpose,) = (node for node in graph.node if reshape.output[0] in node.input)
    grid = numpy_helper.to_array(positions).reshape(1, 6, 6, WIDTH).transpose(0, 3, 1, 2)
    graph.initializer.remove(positions)
    graph.initializer.append(numpy_helper.from_array(grid.copy(), transpose.output[0]))
    for node in (reshape, transpose):
        graph.node.remove(node)


@pytest.mark.parametrize("store", [to_constants, to_grid])
@torch.no_grad()
def test_positions_are_found_however_they_are_stored(copy, store):
    expected = td.convert_weights(copy, BACKBONE).tensors["pos_embed"]
    assert torch.equal(
        td.convert_weights(change(copy, store), BACKBONE).tensors["pos_embed"], expected
    )
    assert run(copy, images(1, *OTHER)).isfinite().all()


@torch.no_grad()
def test_weights_and_positions_with_names_of_their_own_are_read(tmp_path):
    path = export(tmp_path / "encoder.onnx", Encoder(), do_constant_folding=False)
    names = {value.name for value in onnx.load(path).graph.initializer}
    assert "backbone.embeddings.position_embeddings" in names
    expected = run(path, images(2, *OTHER))
    torch.testing.assert_close(features(path, BACKBONE, OTHER), expected, atol=1e-5, rtol=1e-5)


def test_the_file_says_how_its_positions_are_resized(exported, tmp_path):
    converted = td.convert_weights(exported, BACKBONE)
    plain = converted.save(tmp_path / "plain.safetensors")
    resized = converted.resized_to(OTHER).save(tmp_path / "resized.safetensors")
    larger = replace(BACKBONE, args=BACKBONE.args | {"img_size": OTHER}).with_head(0)
    loaded = [larger.create() for _ in range(2)]
    for vit, path in zip(loaded, (plain, resized), strict=True):
        load_weights(vit, path)
        with safe_open(path, "pt") as opened:
            assert opened.metadata()["position_resizing"] == "without_antialiasing"
    assert torch.equal(loaded[0].pos_embed, loaded[1].pos_embed)
    # On a smaller grid, antialiasing makes a large difference.
    converted = replace(converted, from_transformers=False, kind="ViT")
    smooth = converted.resized_to((12, 12)).tensors["pos_embed"]
    sharp = replace(converted, from_transformers=True).resized_to((12, 12)).tensors["pos_embed"]
    assert (smooth - sharp).abs().max() > 0.01


def test_a_file_of_the_real_size_names_its_model(tmp_path, cli):
    """Names and shapes alone: all numbers are 0."""
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks": "encoder.layer",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
    }
    with torch.device("meta"):
        vit = td.Backbone(name="vit_small_patch14_dinov2", weights=None).with_head(0).create()
    stored = []
    for name, value in vit.state_dict().items():
        theirs = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        for ours, their_part in names.items():
            theirs = theirs.replace(ours, their_part)
        parts = ("query", "key", "value") if "attn.qkv" in name else ("",)
        for part in parts:
            shape = [value.shape[0] // len(parts), *value.shape[1:]]
            whose = theirs.replace("attn.qkv", f"attention.attention.{part}")
            zeros = torch.zeros(shape).numpy()
            stored.append(numpy_helper.from_array(zeros, f"model.vit.{whose}"))
    path = tmp_path / "released.onnx"
    onnx.save(helper.make_model(helper.make_graph([], "graph", [], [], stored)), path)
    out = path.with_suffix(".safetensors")
    code, printed, err = cli("weights", "convert", path, "--img-size", 112)
    assert (code, err) == (0, "")
    assert printed == (
        f"wrote {out}: DINOv2 weights of vit_small_patch14_dinov2, 174 tensors, "
        "no classifier head\n"
    )
    with safe_open(out, "pt") as opened:
        assert opened.get_slice("pos_embed").get_shape() == [1, 65, 384]
        assert opened.metadata()["grid"] == "8x8"


def remove(pattern):
    return lambda graph: graph.initializer.remove(initializer(graph, pattern))


def add(name):
    zeros = torch.zeros(1, 4, WIDTH).numpy()
    return lambda graph: graph.initializer.append(numpy_helper.from_array(zeros, name))


def second_encoder(graph):
    for name in (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layer_scale1.lambda1",
    ):
        add(f"teacher.{name}")(graph)


def set_resize(**settings):
    def edit(graph):
        (resize,) = (node for node in graph.node if node.op_type == "Resize")
        kept = [a for a in resize.attribute if a.name not in settings]
        del resize.attribute[:]
        resize.attribute.extend(
            [*kept, *(helper.make_attribute(n, v) for n, v in settings.items())]
        )

    return edit


def resize_by_factors(graph):
    (resize,) = (node for node in graph.node if node.op_type == "Resize")
    resize.input[2], resize.input[3] = resize.input[3], ""


def other_type(graph):
    bias = initializer(graph, "layernorm.bias")
    bias.CopyFrom(helper.make_tensor(bias.name, TensorProto.BFLOAT16, [WIDTH], [0.0] * WIDTH))


def cut_off(graph):
    bias = initializer(graph, "layernorm.bias")
    bias.raw_data = bias.raw_data[:-4]


def of_another_width(graph):
    of_class = initializer(graph, r"::Concat_\d+")
    of_class.CopyFrom(numpy_helper.from_array(torch.zeros(1, 1, 3).numpy(), of_class.name))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut_off, "is damaged or not a weight file of ONNX: backbone.layernorm.bias "),
        (of_another_width, "1 missing: pos_embed"),
        (remove("layer.0.layer_scale1.lambda1"), "expected one Dinov2 encoder .*, found none"),
        (second_encoder, "expected one Dinov2 encoder of transformers .*, found 2 of them"),
        (add("backbone.embeddings.register_tokens"), "with registers is not read from ONNX"),
        (remove(r"layer\.1\.norm2\.bias"), "1 missing: blocks.1.norm2.bias"),
        (remove(r"layer\.1\.mlp\.fc1\.bias"), "2 missing: blocks.1.mlp.fc1.weight, blocks"),
        (remove(r"::Concat_\d+"), "1 missing: pos_embed"),
        (set_resize(antialias=1), "must be resized as transformers' Dinov2 does it"),
        (set_resize(cubic_coeff_a=-0.5), "must be resized as transformers' Dinov2 does it"),
        (resize_by_factors, "must be resized as transformers' Dinov2 does it"),
        (other_type, "backbone.layernorm.bias must be of a float type, got bfloat16"),
    ],
)
def test_other_files_are_refused_in_one_line(copy, edit, message):
    change(copy, edit)
    with pytest.raises(ValueError, match=message) as error:
        td.convert_weights(copy, BACKBONE)
    assert str(error.value).startswith(str(copy))
    assert "\n" not in str(error.value)


def test_another_number_of_heads_is_refused(exported):
    backbone = replace(BACKBONE, args=BACKBONE.args | {"num_heads": 4})
    message = "has attention heads of width 8, but vit_small_patch14_dinov2 has 4 heads of width 4"
    with pytest.raises(ValueError, match=message):
        td.convert_weights(exported, backbone)


def test_a_damaged_file_is_one_line_and_code_2(tmp_path, cli):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"\x0a\xff weights")
    code, out, err = cli("weights", "convert", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path} is damaged or not a weight file of ONNX (")
    assert err.count("\n") == 1


def test_a_width_without_a_name_asks_for_the_model(exported, cli):
    code, out, err = cli("weights", "convert", exported)
    assert (code, out) == (2, "")
    assert "do not say which timm model they belong to" in err


def test_the_missing_package_is_named(exported, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, which is not .*'tokendial\[export\]'"):
        td.convert_weights(exported, BACKBONE)


def test_the_decoder_is_counted_as_left_out(tmp_path):
    path = export(tmp_path / "saliency.onnx", Saliency(padding=1))
    assert td.convert_weights(path, BACKBONE).left_out == {"decoder": 14}
