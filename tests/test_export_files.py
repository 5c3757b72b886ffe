"""Exported files, run by onnxruntime, OpenVINO and torch."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
from examples import REDUCERS, images, perturbed, tiny_vit
from limits import files_of_at_most
from PIL import Image

import tokendial as td
from tokendial.export_files import FACTS, export, export_bundle, write_bundle
from tokendial.runs import Run
from tokendial.runs.new_model import build_model
from tokendial.runs.predict import predict
from tokendial.runs.recipe import check_recipe

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

# Almost all the time goes into torch's exporter, and grows with the blocks: most models have one.
METHODS = {
    "tome": td.ToMe(r=4),
    "tome similarity": td.ToMe(r=4, sizes="similarity"),
    "tome clips": td.ToMe(r=4),
    "evit": td.EViT(keep_rate=0.6, layers=(1,)),
    "evit each": td.EViT(r=4),
    "evit shift": td.EViT(keep_rate=0.6, layers=(1,), score="shift"),
    "dynamicvit": td.DynamicViT(keep_rate=0.6, layers=(1,)),
    "dyt": td.DyT(),
    "dyt topk": td.DyT(selection="topk"),
    "dar": td.DAR(),
    "ffn_merge": td.FFNMerge(r=4),
    "pitome": td.PiToMe(r=4),
    "prune_merge": td.PruneMerge(r=4),
    "learnt_metric": td.LearntMetric(r=4, dim=8),
    "pyra": td.PYRA(r=4),
    "in_windows": td.InWindows(reduce=td.ToMe(r=1)),
    "in regions": td.InWindows(reduce=td.ToMe(r=4), regions=[[0, 0, 1, 1]] * 3 + [[1] * 4]),
    "frame_by_frame": td.FrameByFrame(reduce=td.ToMe(r=4)),
    "stack": td.Stack(methods=[td.ToMe(r=4), td.DyT(selection="topk")]),
}
# How many tokens these select depends on the image, and has a name of torch's in the file.
BY_THRESHOLD = ("dyt", "dar")
DECODERS = {
    "linear": td.LinearDecoder(num_classes=3),
    "upconv": td.UpConvDecoder(num_classes=3, channels=(8, 4)),
    "segmenter": td.MaskTransformer(num_classes=3, depth=1),
    "dar": td.DARDecoder(num_classes=3, channels=8, enlarge=2),
}
BACKBONES = {
    "eva02": {},  # rotary: positions follow tokens into the second block
    "siglip": {"depth": 1},
    "hf vit": {"num_hidden_layers": 1},
    "hf siglip": {"num_hidden_layers": 1},
    "hf mae": {"num_hidden_layers": 1},
    "torchvision": {"num_layers": 1},
    "open_clip": {"layers": 1},
}


# Operators that TensorRT 8.5 runs, by docs/operators.md of onnx-tensorrt, without control flow; the
# last two came in TensorRT 10.
TENSORRT = """
Abs Add And ArgMax Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos CumSum Div
Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual
Identity Less LessOrEqual Log LogSoftmax MatMul Max Min Mod Mul Neg NonZero Not Or Pad Pow Range
Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round
ScatterElements ScatterND Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK
Transpose Unsqueeze Where LayerNormalization Gelu
"""
# Inputs that TensorRT needs to know when it builds: counts and axes.
KNOWN_INPUTS = {"TopK": 1, "Squeeze": 1, "Unsqueeze": 1, "Slice": 3}


def check_tensorrt(graph):
    """TensorRT itself is not at hand, so its published list of operators is checked."""
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        assert node.op_type in TENSORRT.split()
        if (place := KNOWN_INPUTS.get(node.op_type)) is not None:
            assert set(node.input[place : place + 1]) <= stored, node


# One block and 16 patches. The head reads all of them, so that block reduces.
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "global_pool": "avg"}


def small_vit(**kwargs):
    return tiny_vit(**SMALL | kwargs)


def model_of(name, **kwargs):
    torch.manual_seed(0)
    if name == "frame_by_frame":
        sizes = {"img_size": 32, "num_classes": 7, "frames": 4} | SMALL
        del sizes["global_pool"]
        vit = perturbed(timm.create_model("videomae_small_patch16_224", **sizes))
    elif name == "tome clips":
        vit = perturbed(td.video_vit(small_vit(global_pool="token"), frames=2, num_classes=7))
    else:
        vit = small_vit(**kwargs)
    return td.wrap(vit, reduce=METHODS[name]).eval()


def inputs(model, count):
    """Images of a model's size, or clips."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, *model.anatomy.input_shape, generator=generator)


def sides(graph):
    """What the sides of all tensors of a graph are called, where they are no numbers."""
    values = (*graph.input, *graph.output, *graph.value_info)
    return {d.dim_param for v in values for d in v.type.tensor_type.shape.dim if d.dim_param}


@pytest.fixture
def untrained(tmp_path):
    """A run on three classes whose best model is the fresh one."""
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {
            "name": "vit_tiny_patch16_224",
            "weights": None,
            "img_size": 28,
            "args": {
                "patch_size": 7,
                "embed_dim": 24,
                "depth": 1,
                "num_heads": 2,
                "global_pool": "avg",
            },
        },
        "reduce": {"name": "tome", "r": 2},
        "adapt": {"name": "full"},
        "data": {"name": "image_folder", "root": "none"},
    }
    run = Run(recipe["output"])
    run.claim(check_recipe(recipe), ["ant", "bee", "crab"])
    build_model(check_recipe(recipe), 3).save_pretrained(run.best)
    return run


def code_of_the_page(number):
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number]


def run(path, pictures):
    """Outputs of an ONNX file in onnxruntime, by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": pictures.numpy()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def run_openvino(path, pictures, *weights):
    """Outputs of an ONNX or OpenVINO file in OpenVINO, by name."""
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    session = core.compile_model(core.read_model(path, *weights), "CPU", settings)
    found = session(pictures.numpy())
    return {name: torch.from_numpy(found[port]) for port in session.outputs for name in port.names}


def assert_same(given, wanted):
    """All wanted outputs are there and equal; scaled, because some features are large."""
    for name, values in wanted.items():
        assert given[name].shape == values.shape
        difference = (given[name] - values).abs().max() / values.abs().max().clamp(min=1)
        assert difference < 1e-4, (name, difference)


def check_file(model, found, *, count=None, outputs=("embeddings", "feature_map")):
    """An exported file computes what the model does, in both runtimes, and is sound.

    Args:
        model: The model at the degree of the file.
        found: What `export` returned.
        count: Fixed batch size of the file; None: it takes any.
        outputs: The outputs besides logits that it has.
    """
    assert (found.degree, found.gmacs) == (model.degree, model.cost().gmacs)
    for pictures in [inputs(model, each) for each in ([count] if count else [1, 4])]:
        wanted = {name: getattr(model, name)(pictures) for name in outputs}
        wanted["logits"] = model(pictures)
        assert_same(run(found.path, pictures), wanted)
        assert_same(run_openvino(found.path, pictures), wanted)
    onnx.shape_inference.infer_shapes_path(
        found.path,
        found.path.with_suffix(".inferred"),
        check_type=True,
        strict_mode=True,
        data_prop=True,
    )
    onnx.checker.check_model(found.path, full_check=True)
    file = onnx.load(found.path)
    check_tensorrt(file.graph)
    scatters = [node for node in file.graph.node if "Scatter" in node.op_type]
    given = {a.s.decode() for node in scatters for a in node.attribute if a.name == "reduction"}
    assert given <= {"none"}
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["tokendial.outputs"] == ["logits", *outputs]
    assert facts["tokendial.input"] == list(model.anatomy.input_shape)
    assert [output.name for output in file.graph.output] == ["logits", *outputs]
    for value in (*file.graph.input, *file.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        assert (batch.dim_value or batch.dim_param) == (count or "batch")
    return file.graph


def test_every_method_is_exported():
    assert {type(config) for config in REDUCERS.values()} == {*map(type, METHODS.values())}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_degree_within_the_dial_for_any_batch(name, tmp_path):
    model = model_of(name)
    model.set_degree(model.degrees[len(model.degrees) // 2])
    outputs = {"embeddings": True, "feature_map": True}
    graph = check_file(model, export(model, tmp_path / "model.onnx", **outputs))
    assert name in BY_THRESHOLD or all(
        re.fullmatch(r"(\d+\*)?batch", side) for side in sides(graph)
    )
    pictures, degree = inputs(model, 2), model.degree
    reduced = model.feature_map(pictures)
    model.set_degree(0)
    assert (model.feature_map(pictures) - reduced).abs().amax() > 1e-3, degree


@pytest.mark.parametrize("name", [name for name in METHODS if " " not in name])
@torch.no_grad()
def test_the_last_degree_for_one_batch_size(name, tmp_path):
    model = model_of(name)
    model.set_degree(model.degrees[-1])
    check_file(model, export(model, tmp_path / "model.onnx", batch=2), count=2, outputs=())


@pytest.mark.parametrize(("name", "degree"), [("tome", 0), ("tome", 4), ("evit", 5)])
@torch.no_grad()
def test_two_blocks_whose_head_reads_the_class_token(name, degree, tmp_path):
    # Sizes of merged tokens weigh in the second block, whose patch outputs are skipped.
    model = model_of(name, depth=2, global_pool="token")
    model.set_degree(degree)
    check_file(model, export(model, tmp_path / "model.onnx"), outputs=())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_masks(name, tmp_path):
    torch.manual_seed(0)
    vit = small_vit(num_classes=0)
    model = perturbed(td.wrap(vit, reduce=td.EViT(r=4), decode=DECODERS[name]))
    check_file(model, export(model, tmp_path / "model.onnx"), outputs=())


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_other_backbones(name, tmp_path):
    # Imported here, because transformers and open_clip take longer to import than all else.
    if name == "open_clip":
        from test_open_clip import tiny_clip

        vit = tiny_clip(**BACKBONES[name]).visual
    else:
        from zoo import backbone

        vit, _ = backbone(name, **BACKBONES[name])
    model = td.wrap(vit, reduce=td.ToMe(r=4)).eval()
    outputs = ("feature_map",)  # the patches that leave the last block are not skipped
    check_file(model, export(model, tmp_path / "model.onnx", feature_map=True), outputs=outputs)


@torch.no_grad()
def test_a_subnet_of_a_supernet_is_exported(tmp_path):
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=td.NOAHSupernet(depths=(1,)))
    perturbed(model.adapter)
    largest = model.eval()(images(3))
    model.adapter.use(td.NOAH(prompts=[5, 0], rank=[1, 0], dim=0))
    expected = model(images(3))
    assert (expected - largest).abs().amax() > 1e-3
    graph = torch.export.load(export(model, tmp_path / "model.pt2").path).module()
    torch.testing.assert_close(graph(images(3)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_torchs_own_format_gives_the_same_outputs_and_leaves_the_model_alone(tmp_path):
    model = td.wrap(small_vit(), reduce=td.ToMe(r=4), adapt=td.LoRA(rank=2)).train()
    found = export(model, tmp_path / "model.pt2", degree=2, embeddings=True, feature_map=True)
    assert (model.degree, model.training) == (4, True)
    model.eval().set_degree(2)
    logits, embeddings, maps = torch.export.load(found.path).module()(images(3))
    torch.testing.assert_close(logits, model(images(3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings, model.embeddings(images(3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps, model.feature_map(images(3)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_queries_that_read_the_blocks_are_in_the_file(tmp_path):
    torch.manual_seed(0)
    adapt = td.SynQT(queries=2, dim=4, attention_dim=2)
    model = td.wrap(small_vit(global_pool="token"), reduce=td.ToMe(r=4), adapt=adapt).eval()
    check_file(model, export(model, tmp_path / "model.onnx"), outputs=())


@pytest.mark.parametrize(("to", "ending"), [("onnx", "onnx"), ("openvino", "xml")])
@torch.no_grad()
def test_a_bundle_holds_the_weights_once_and_says_how_to_call_it(to, ending, tmp_path):
    model = td.wrap(small_vit(embed_dim=96), reduce=td.ToMe(r=4)).eval()
    export_bundle(model, tmp_path, (0, 4), to=to, batch=2)
    facts = json.loads((tmp_path / "bundle.json").read_text())
    assert (facts["input"], facts["outputs"]) == ([3, 32, 32], ["logits"])
    assert facts["files"] == {"0": f"degree_0.{ending}", "4": f"degree_4.{ending}"}
    weights = [tmp_path / "weights.bin"] if to == "openvino" else []
    for degree, name in facts["files"].items():
        model.set_degree(int(degree))
        found = run_openvino(tmp_path / name, images(), *weights)
        assert_same(found, {"logits": model(images())})
        if to == "onnx":
            assert_same(run(tmp_path / name, images()), {"logits": model(images())})
    assert {path.name for path in tmp_path.iterdir()} == {
        *facts["files"].values(),
        "bundle.json",
        "weights.bin",
    }
    own = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "weights.bin").stat().st_size < 1.1 * own


def test_another_bundle_leaves_no_file_that_would_read_its_weights(tmp_path):
    first, second = tmp_path / "degree_0.onnx", tmp_path / "degree_4.onnx"
    for names in ({0: first.name}, {4: second.name}):
        value = onnx.numpy_helper.from_array(np.zeros(999, np.float32) + len(names), "value")
        node = onnx.helper.make_node("Identity", ["value"], ["out"])
        graph = onnx.helper.make_graph([node], "graph", [], [], [value])
        for name in names.values():
            onnx.save(onnx.helper.make_model(graph), tmp_path / name)
        write_bundle(tmp_path, names, {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "degree_4.onnx",
        "bundle.json",
        "weights.bin",
    }


def test_the_program_of_the_page_predicts_without_tokendial(untrained, tmp_path, monkeypatch, cli):
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (45, 83, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera that was held upright
    image.save(tmp_path / "image.png", exif=turned)
    monkeypatch.chdir(tmp_path)
    arguments = ("--degrees", 1, "--embeddings", "--feature-map", "--out", ".")
    assert cli("export", untrained.folder, *arguments)[0] == 0
    Path("degree_1.onnx").rename("model.onnx")
    code, named = code_of_the_page(0), {}
    exec(code, named)
    (ours,) = predict(untrained, [tmp_path / "image.png"], degree=1, top=3)
    theirs = dict(zip(named["facts"]["classes"], named["probabilities"].tolist(), strict=True))
    expected = dict(zip(ours.classes, ours.probabilities, strict=True))
    assert theirs == pytest.approx(expected, abs=1e-6)
    # Without the resize rule the answer is another one.
    exec(code.replace('facts["short_side"]', "None"), named)
    assert abs(named["probabilities"].max() - ours.probabilities[0]) > 1e-5
    assert named["facts"]["degree"] == 1
    assert named["facts"]["outputs"] == ["logits", "embeddings", "feature_map"]
    assert named["facts"]["crop"] == [28, 28]
    bundle = json.loads(Path("bundle.json").read_text())
    assert bundle.items() >= {n: v for n, v in named["facts"].items() if n != "degree"}.items()


def test_a_pt2_file_says_the_same(untrained, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    assert cli("export", untrained.folder, "--to", "pt2", "--out", "model.pt2")[0] == 0
    named = {}
    exec(code_of_the_page(1), named)
    facts = json.loads(named["extra"][FACTS])
    assert facts["classes"] == ["ant", "bee", "crab"]
    assert (facts["short_side"], facts["interpolation"], facts["divide_by"]) == (32, "bicubic", 255)


@pytest.mark.parametrize("ending", ["onnx", "pt2", "xml"])
def test_a_file_that_does_not_fit_is_told_and_the_old_one_stays(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    path.write_text("old")
    with files_of_at_most(20_000), pytest.raises(OSError, match="the file stays as it was"):
        export(td.wrap(tiny_vit(depth=1)), path)
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "old")]


def test_mistakes_are_told(tmp_path):
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8))
    with pytest.raises(ValueError, match=r"out must end in \.onnx, \.pt2, \.xml, got .*model\.pth"):
        export(model, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        export(model, tmp_path / "model.onnx", batch=0)
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 99"):
        export(model, tmp_path / "model.onnx", degree=99)
    with pytest.raises(ValueError, match="degrees cannot share weights in pt2, .* hold their own"):
        export_bundle(model, tmp_path, (0, 4), to="pt2")
    assert list(tmp_path.iterdir()) == []
