"""Exported files, run by onnxruntime and by torch."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from examples import images, perturbed, tiny_vit
from limits import files_of_at_most
from PIL import Image

import tokendial as td
from tokendial.export_files import FACTS, export, export_bundle
from tokendial.runs import Run
from tokendial.runs.new_model import build_model
from tokendial.runs.predict import predict
from tokendial.runs.recipe import check_recipe

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = {
    "tome": td.ToMe(r=8),
    "evit": td.EViT(keep_rate=0.6, layers=(1, 2)),
    "evit each": td.EViT(r=8),
    "dynamicvit": td.DynamicViT(keep_rate=0.6, layers=(1, 2)),
    "dar": td.DAR(),
    "dyt": td.DyT(),
    "dyt topk": td.DyT(selection="topk"),
    "ffn_merge": td.FFNMerge(r=16),
    "tome similarity": td.ToMe(r=8, sizes="similarity"),
    "evit shift": td.EViT(keep_rate=0.6, layers=(1, 2), score="shift"),
    "pitome": td.PiToMe(r=8),
    "prune_merge": td.PruneMerge(r=8),
    "learnt_metric": td.LearntMetric(r=8, dim=8),
    "pyra": td.PYRA(r=8),
    "in_windows": td.InWindows(reduce=td.ToMe(r=2)),
    "stack": td.Stack(methods=[td.ToMe(r=8), td.DyT(selection="topk")]),
}


CASES = [("tome", 0), ("tome", 8), ("tome", 32), ("evit", 2), ("evit", 9), ("evit each", 8),
         ("dynamicvit", 3), ("dynamicvit", 9), ("dar", 3), ("dar", 9), ("dyt", 5), ("dyt topk", 4),
         ("dyt topk", 9), ("ffn_merge", 16), ("ffn_merge", 32),
         ("pitome", 8), ("prune_merge", 8), ("tome similarity", 8), ("evit shift", 3),
         ("learnt_metric", 8), ("pyra", 8), ("in_windows", 2), ("stack", 8)]  # fmt: skip


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


def model_of(name):
    torch.manual_seed(0)
    return td.wrap(tiny_vit(depth=2), reduce=METHODS[name])


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
            "args": {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2},
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
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": pictures.numpy()})[0])


def run_openvino(path, pictures):
    session = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(session(pictures.numpy())["logits"])


def reductions(path):
    """What scatters of a graph do with values that collide."""
    return {
        attribute.s.decode()
        for node in onnx.load(path).graph.node
        if "Scatter" in node.op_type
        for attribute in node.attribute
        if attribute.name == "reduction"
    }


@pytest.mark.parametrize(("name", "degree"), CASES)
@torch.no_grad()
def test_onnx_gives_the_same_logits_for_any_batch(name, degree, tmp_path):
    model = model_of(name)
    model.set_degree(degree)
    found = export(model, tmp_path / "model.onnx")
    assert (found.degree, found.gmacs) == (model.degree, model.cost().gmacs)
    for count in (1, 4):
        ours = model.eval()(images(count))
        torch.testing.assert_close(run(found.path, images(count)), ours, atol=1e-4, rtol=0)
        theirs = run_openvino(found.path, images(count))
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    onnx.shape_inference.infer_shapes_path(
        found.path, tmp_path / "inferred.onnx", check_type=True, strict_mode=True, data_prop=True
    )
    onnx.checker.check_model(found.path, full_check=True)
    assert reductions(found.path) <= {"none"}
    graph = onnx.load(found.path).graph
    check_tensorrt(graph)
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    # How many tokens DAR and DyT select has a name of torch's, too.
    assert name in ("dar", "dyt") or all(
        re.fullmatch(r"(\d+\*)?batch", side) for side in sides(graph)
    )


@torch.no_grad()
def test_a_subnet_of_a_supernet_is_exported(tmp_path):
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=td.NOAHSupernet(depths=(1,)))
    perturbed(model.adapter)
    largest = model.eval()(images(3))
    model.adapter.use(td.NOAH(prompts=[5, 0], rank=[1, 0], dim=0))
    expected = model(images(3))
    assert (expected - largest).abs().amax() > 1e-3
    for name in ("model.onnx", "model.pt2"):
        found = export(model, tmp_path / name)
        graph = torch.export.load(found.path).module() if name.endswith("pt2") else None
        logits = graph(images(3)) if graph else run(found.path, images(3))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_torchs_own_format_gives_the_same_logits_and_leaves_the_model_alone(tmp_path):
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=td.LoRA(rank=2)).train()
    found = export(model, tmp_path / "model.pt2", degree=4)
    assert (model.degree, model.training) == (8, True)
    model.eval().set_degree(4)
    graph = torch.export.load(found.path).module()
    torch.testing.assert_close(graph(images(3)), model(images(3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "run_file"),
    [
        ("model.onnx", run),
        ("model.pt2", lambda path, pictures: torch.export.load(path).module()(pictures)),
    ],
)
@torch.no_grad()
def test_queries_that_read_the_blocks_are_in_the_file(name, run_file, tmp_path):
    torch.manual_seed(0)
    adapt = td.SynQT(queries=2, dim=4, attention_dim=2)
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=adapt).eval()
    found = export(model, tmp_path / name)
    ours = model(images(3))
    torch.testing.assert_close(run_file(found.path, images(3)), ours, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bundle_holds_the_weights_once_and_says_how_to_call_it(tmp_path):
    model = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=8)).eval()
    one = export(model, tmp_path / "one.onnx", degree=0).path.stat().st_size
    export_bundle(model, tmp_path / "bundle", (0, 8), batch=2)
    facts = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert facts["input"] == [3, 32, 32]
    for degree, name in facts["files"].items():
        model.set_degree(int(degree))
        path = tmp_path / "bundle" / name
        torch.testing.assert_close(run(path, images()), model(images()), atol=1e-4, rtol=0)
    whole = sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir())
    assert whole < 1.6 * one


def test_the_program_of_the_page_predicts_without_tokendial(untrained, tmp_path, monkeypatch, cli):
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (45, 83, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera that was held upright
    image.save(tmp_path / "image.png", exif=turned)
    monkeypatch.chdir(tmp_path)
    assert cli("export", untrained.folder, "--degree", 1, "--out", "model.onnx")[0] == 0
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
    assert named["facts"]["crop"] == [28, 28]


def test_a_pt2_file_and_a_bundle_say_the_same(untrained, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    assert cli("export", untrained.folder, "--to", "pt2", "--out", "model.pt2")[0] == 0
    named = {}
    exec(code_of_the_page(1), named)
    facts = json.loads(named["extra"][FACTS])
    assert facts["classes"] == ["ant", "bee", "crab"]
    assert (facts["short_side"], facts["interpolation"], facts["divide_by"]) == (32, "bicubic", 255)
    assert cli("export", untrained.folder, "--degrees", "2", "--out", "bundle")[0] == 0
    bundle = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert bundle.items() >= {n: v for n, v in facts.items() if n != "degree"}.items()


@pytest.mark.parametrize("ending", ["onnx", "pt2", "xml"])
def test_a_file_that_does_not_fit_is_told_and_the_old_one_stays(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    path.write_text("old")
    with files_of_at_most(20_000), pytest.raises(OSError, match="the file stays as it was"):
        export(td.wrap(tiny_vit(depth=1)), path)
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "old")]


def test_mistakes_are_told(tmp_path):
    model = model_of("tome")
    with pytest.raises(ValueError, match=r"out must end in \.onnx, \.pt2, \.xml, got .*model\.pth"):
        export(model, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        export(model, tmp_path / "model.onnx", batch=0)
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 99"):
        export(model, tmp_path / "model.onnx", degree=99)
    assert list(tmp_path.iterdir()) == []
