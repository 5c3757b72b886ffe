"""Exported files, run by onnxruntime and by torch."""

import json

import onnx
import onnxruntime
import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from tokendial.export import export, export_bundle

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = {
    "tome": td.ToMe(r=8),
    "evit": td.EViT(keep_rate=0.6, layers=(1, 2)),
    "dynamicvit": td.DynamicViT(keep_rate=0.6, layers=(1, 2)),
    "dar": td.DAR(),
    "dyt topk": td.DyT(selection="topk"),
    "ffn_merge": td.FFNMerge(r=16),
}


def model_of(name):
    torch.manual_seed(0)
    return td.wrap(tiny_vit(depth=2), reduce=METHODS[name])


def run(path, pictures):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": pictures.numpy()})[0])


def reductions(path):
    """What scatters of a graph do with values that collide."""
    return {
        attribute.s.decode()
        for node in onnx.load(path).graph.node
        if "Scatter" in node.op_type
        for attribute in node.attribute
        if attribute.name == "reduction"
    }


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_onnx_gives_the_same_logits_for_any_batch(name, tmp_path):
    model = model_of(name)
    found = export(model, tmp_path / "model.onnx")
    assert (found.degree, found.gmacs) == (model.degree, model.cost().gmacs)
    for count in (1, 4):
        ours = model.eval()(images(count))
        torch.testing.assert_close(run(found.path, images(count)), ours, atol=1e-4, rtol=0)
    assert reductions(found.path) <= {"none"}


@torch.no_grad()
def test_torchs_own_format_gives_the_same_logits_and_leaves_the_model_alone(tmp_path):
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=td.LoRA(rank=2)).train()
    found = export(model, tmp_path / "model.pt2", degree=4)
    assert (model.degree, model.training) == (8, True)
    model.eval().set_degree(4)
    graph = torch.export.load(found.path).module()
    torch.testing.assert_close(graph(images(3)), model(images(3)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bundle_holds_the_weights_once_and_says_how_to_call_it(tmp_path):
    model = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=8)).eval()
    one = export(model, tmp_path / "one.onnx", degree=0).path.stat().st_size
    export_bundle(model, tmp_path / "bundle", (0, 8), batch=2)
    told = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert told["input"] == [3, 32, 32]
    for degree, name in told["files"].items():
        model.set_degree(int(degree))
        path = tmp_path / "bundle" / name
        torch.testing.assert_close(run(path, images()), model(images()), atol=1e-4, rtol=0)
    whole = sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir())
    assert whole < 1.6 * one


def test_mistakes_are_told(tmp_path):
    model = model_of("tome")
    with pytest.raises(ValueError, match=r"out must end in \.onnx or \.pt2, got .*model\.pth"):
        export(model, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        export(model, tmp_path / "model.onnx", batch=0)
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 99"):
        export(model, tmp_path / "model.onnx", degree=99)
    assert list(tmp_path.iterdir()) == []
