"""Tiny Dinov2 models of transformers, exported by torch as the real files are."""

import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from examples import perturbed
from onnx import numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import tokendial as td

PATCH, SIDE, WIDTH = 4, 24, 16
SIZES = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
BACKBONE = td.Backbone(name="vit_small_patch14_dinov2", weights=None, args=SIZES)
DECODER = td.UpConvDecoder(channels=(12, 8))
# In transformers 4, from which the real file was exported, these layers had longer names.
OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


class Encoder(nn.Module):
    """Returns all tokens after the final norm; `backbone` is the prefix of the names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        sizes = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        self.backbone = Dinov2Model(Dinov2Config(**sizes | layers | settings))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).last_hidden_state


class Saliency(Encoder):
    """The encoder with a decoder that gives probabilities at the size of the image."""

    def __init__(self, reads: str = "last_hidden_state", **settings: Any) -> None:
        super().__init__()
        self.reads = reads
        widths = (WIDTH, 12, 8)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            up = nn.ConvTranspose2d(inputs, outputs, **{"kernel_size": 4, "stride": 2} | settings)
            layers += [up, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(8, 1, 1))
        for norm in self.decoder.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.5, 0.5)
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.backbone(x, output_hidden_states=True)
        tokens = found.last_hidden_state
        if self.reads == "block":  # so that the exporter keeps the layers after it
            tokens = found.hidden_states[1] + 0.1 * tokens
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        patches = tokens[:, 1:].transpose(1, 2).reshape(x.shape[0], WIDTH, rows, columns)
        return F.interpolate(self.decoder(patches), x.shape[2:], mode="bilinear").sigmoid()


def export(path: Path, model: nn.Module, *, fresh: bool = False, **settings: Any) -> Path:
    """Export a model, whose input may have any size.

    Args:
        path: The file to write.
        model: The model.
        fresh: Keep the new weights, many of which are equal, instead of changing each of them.
        settings: Arguments of the exporter.
    """
    model = model.eval() if fresh else perturbed(model, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and tracing warns
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, SIDE, SIDE),),
            path,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}},
            dynamo=False,
            **settings,
        )
    return path


def as_the_real_file(path: Path, model: Encoder) -> Path:
    """Rename tensors as transformers 4 and its exporter did, with keys and values before queries.

    Weights are told apart by their values, not by the graph, which is what the tests are about.
    """
    content = onnx.load(path)
    weights = {n: v for n, v in model.named_parameters() if v.ndim == 2 and n.endswith("weight")}
    order = ("k_proj", "v_proj", "q_proj", "o_proj", "fc1", "fc2")
    sequence = sorted(
        weights, key=lambda n: (n.split(".layer.")[1][0], order.index(n.split(".")[-2]))
    )
    renamed = {}
    for stored in content.graph.initializer:
        if "::MatMul" in stored.name:
            value = torch.tensor(numpy_helper.to_array(stored))
            (whose,) = (n for n in sequence if torch.equal(weights[n].T, value))
            renamed[stored.name] = f"onnx::MatMul_{1000 + sequence.index(whose)}"
        for new, old in OLD_NAMES.items():
            if new in stored.name:
                renamed[stored.name] = stored.name.replace(new, old)
    rename(content, renamed)
    content.graph.initializer.sort(key=lambda stored: stored.name)
    onnx.save(content, path)
    return path


def rename(content: Any, names: dict[str, str]) -> None:
    """Rename values of a graph."""
    for stored in content.graph.initializer:
        stored.name = names.get(stored.name, stored.name)
    for node in content.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


def change(path: Path, edit: Callable[[Any], None]) -> Path:
    """Apply a function to the graph of a file."""
    content = onnx.load(path)
    edit(content.graph)
    onnx.save(content, path)
    return path


def initializer(graph: Any, pattern: str) -> Any:
    """The only stored weight of a graph whose name ends with a pattern."""
    (found,) = (v for v in graph.initializer if re.search(f"{pattern}$", v.name))
    return found


def run(path: Path, images: Tensor) -> Tensor:
    """The output of a file in onnxruntime."""
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": images.numpy()})[0])
