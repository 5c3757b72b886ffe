"""Files with 8-bit linear layers: what they compute in 8 bits, and when they are refused."""

import collections
import json
import re

import onnx
import onnxruntime
import pytest
import torch

import tokendial as td
from tokendial.runs import Run
from tokendial.runs.evaluate import validation_set
from tokendial.runs.export_int8 import export_int8, export_int8_bundle

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")


def products(path) -> collections.Counter:
    """Matrix products of a file by the type of their node."""
    kinds = (node.op_type for node in onnx.load(path).graph.node)
    return collections.Counter(kind for kind in kinds if "MatMul" in kind or kind == "Gemm")


def test_a_file_in_8_bits_is_written_with_what_it_costs(cli, run, tmp_path):
    path = tmp_path / "small.onnx"
    code, out, _ = cli("export", run.folder, "--int8", "--degree", 8, "--out", path)
    assert code == 0
    found = re.fullmatch(
        r"wrote .*small.onnx: degree 8, accuracy ([\d.]+)% \(float32: ([\d.]+)%\)\n"
        r"accuracy lost, in points with the 95 % interval: ([-+\d.]+) \(.*\)\n",
        out,
    )
    assert found
    after, before, lost = map(float, found.groups())
    assert before - after == pytest.approx(lost, abs=0.11)
    whole = tmp_path / "whole.onnx"
    assert cli("export", run.folder, "--degree", 8, "--out", whole)[0] == 0
    kinds, before_kinds = products(path), products(whole)
    # Products of two activations (attention, and the comparison of tokens) stay as they are.
    depth = run.model().anatomy.shape.depth
    assert kinds["MatMulInteger"] == 6 * depth + 1  # queries, keys, values, projection, FFN; head
    assert kinds["MatMul"] == before_kinds["MatMul"] - 6 * depth
    assert path.stat().st_size < whole.stat().st_size


def test_a_bundle_in_8_bits_comes_with_a_table(cli, run, tmp_path):
    code, out, _ = cli("export", run.folder, "--int8", "--degrees", "0,8", "--out", tmp_path)
    assert code == 0
    row = r"(\d+) +\S +([\d.]+)% +\S +([\d.]+)% +\S +([-+\d.]+) \([-+\d., ]+\)"
    rows = [[float(cell) for cell in found] for found in re.findall(row, out)]
    names = json.loads((tmp_path / "bundle.json").read_text())["files"]
    assert names == {"0": "degree_0.int8.onnx", "8": "degree_8.int8.onnx"}
    assert [row[0] for row in rows] == [0, 8]
    _, loader = validation_set(run, run.model(), 80)
    ((images, labels),) = loader
    for degree, before, after, lost in rows:
        assert before - after == pytest.approx(lost, abs=0.06)
        session = onnxruntime.InferenceSession(tmp_path / names[f"{degree:.0f}"])
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        right = (logits.argmax(dim=1) == labels).float().mean()
        assert 100 * right == pytest.approx(after, abs=0.01)
        assert products(tmp_path / names[f"{degree:.0f}"])["MatMulInteger"] > 1
    weights = (tmp_path / "weights.bin").stat().st_size
    linear = sum(p.numel() for p in run.model().parameters() if p.ndim == 2)
    assert weights < 2 * linear  # a byte for each number of linear layers, and those once


def test_files_that_lose_too_much_are_refused(run, tmp_path):
    # The same function, but with an outlier among the activations, which 8 bits cannot hold beside
    # the others.
    spoilt = Run(tmp_path / "run")
    spoilt.folder.mkdir()
    for name in ("recipe.yaml", "classes.json"):
        (spoilt.folder / name).write_bytes((run.folder / name).read_bytes())
    model = td.load(run.best)
    with torch.no_grad():
        for block in model.vit.blocks:
            block.norm2.weight[:4] *= 1e5
            block.norm2.bias[:4] *= 1e5
            block.mlp.fc1.weight[:, :4] /= 1e5
    model.save_pretrained(spoilt.best)
    out = tmp_path / "small.onnx"
    with pytest.raises(
        ValueError, match=r"int8 loses [\d.]+ points of accuracy at degree .* \(1\)"
    ):
        export_int8(spoilt, out)
    with pytest.raises(ValueError, match=r"int8 loses .* at degree 0 .* nothing was written"):
        export_int8_bundle(spoilt, [0, 8], tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    found = export_int8(spoilt, out, max_loss=1.0)
    assert found.before - found.after > 0.01
    assert found.accuracy_lost.low <= found.accuracy_lost.value <= found.accuracy_lost.high


def test_mistakes_are_told(cli, run, tmp_path):
    with pytest.raises(ValueError, match=r"out must end in \.onnx for int8, got .*small\.pt2"):
        export_int8(run, tmp_path / "small.pt2")
    for arguments, message in (
        (("--int8", "--embeddings"), "int8 writes ONNX files of logits for any batch: leave out"),
        (("--degree", "2", "--degrees", "0,8"), "degrees writes a bundle of several degrees"),
        (("--to", "pt2", "--degrees", "0,8"), "degrees cannot share weights in pt2"),
    ):
        code, _, err = cli("export", run.folder, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {message}")
