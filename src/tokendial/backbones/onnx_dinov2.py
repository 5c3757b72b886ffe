"""Find the Dinov2 encoder of transformers in an exported ONNX file.

torch's exporter (`torch.onnx.export(..., dynamo=False)`) keeps the names of biases, norms and
tokens. It transposes the weights of linear layers, and numbers them in the order in which the graph
uses them, where keys and values may come before queries. So each weight is found through the graph:
it is the stored factor of the product that the layer's named bias is added to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokendial.backbones.onnx_file import OnnxFile, attributes

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_POSITIONS = "embeddings.position_embeddings"
_FIRST = "encoder.layer.0."
_QUERY_BIASES = ("attention.attention.query.bias", "attention.q_proj.bias")
"""Names of the first layer's query bias, in older and newer versions of transformers."""
_RESHAPES = ("Cast", "Identity", "Reshape", "Transpose")
"""Types of nodes that keep the values, which lie between stored positions and their use."""
_BICUBIC = {"coordinate_transformation_mode": b"half_pixel", "cubic_coeff_a": -0.75}
"""torch's bicubic interpolation with align_corners=False."""


@dataclass(frozen=True)
class OnnxDinov2:
    """A Dinov2 encoder that was found in an ONNX file."""

    tensors: dict[str, Tensor]
    """The encoder's tensors by transformers' names, with the other named weights of the file."""
    head_dim: int | None
    """Width of one attention head; None if the graph does not say."""


def read_dinov2(file: OnnxFile) -> OnnxDinov2:
    """Find a Dinov2 encoder by the names of its tensors, under any prefix.

    A tensor that is not in the file is left out: only the caller knows the size of the model.

    Raises:
        ValueError: If the file holds no such encoder, several of them, one with registers, or one
            whose positions are not resized as transformers' Dinov2 does it.
    """
    names = file.weight_names()
    roots = [n.removesuffix(_PATCHES) for n in names if f".{n}".endswith(f".{_PATCHES}")]
    layer_scales = [root for root in roots if f"{root}{_FIRST}layer_scale1.lambda1" in names]
    if len(layer_scales) != 1:
        found = f"{len(layer_scales)} of them" if layer_scales else "none"
        raise ValueError(
            f"{file.path}: expected one Dinov2 encoder of transformers with the names that torch's "
            f"exporter keeps (...{_PATCHES}, ...{_FIRST}layer_scale1.lambda1), found {found}."
        )
    root = layer_scales[0]
    if f"{root}embeddings.register_tokens" in names:
        raise ValueError(f"{file.path}: Dinov2 with registers is not read from ONNX files.")
    tensors = {name: file.tensor(name) for name in names}
    for bias in (name for name in names if name.startswith(root) and name.endswith(".bias")):
        weight = f"{bias.removesuffix('bias')}weight"
        if weight not in tensors and (factor := _factor(file, bias)):
            tensors[weight] = file.tensor(factor).T
    positions = _positions(file)
    if positions is not None:
        tensors.setdefault(f"{root}{_POSITIONS}", positions)
    biases = [name for some in _QUERY_BIASES if (name := f"{root}{_FIRST}{some}") in tensors]
    return OnnxDinov2(tensors, _head_dim(file, biases[0]) if biases else None)


def _factor(file: OnnxFile, bias: str) -> str | None:
    """Name of the stored matrix of the product that a bias is added to; None if not one."""
    factors = [
        product.input[1]
        for add in file.readers(bias, "Add")
        for value in add.input
        if (product := file.maker(value, "MatMul")) and file.is_stored(product.input[1])
    ]
    return factors[0] if len(factors) == 1 else None


def _positions(file: OnnxFile) -> Tensor | None:
    """Positions [1, 1 + N, D] that the graph resizes; None if they have a name, or there are none.

    Raises:
        ValueError: If the graph resizes them in another way than transformers' Dinov2.
    """
    for resize in file.nodes:
        if resize.op_type != "Resize" or attributes(resize).get("mode") != b"cubic":
            continue
        source, passed = resize.input[0], list[str]()
        while node := file.maker(source, *_RESHAPES, "Slice"):
            source = node.input[0]
            passed.append(node.op_type)
        if not file.is_stored(source):
            continue
        settings = attributes(resize)
        to_a_size = len(resize.input) > 3 and resize.input[3]
        if not to_a_size or settings.get("antialias") or _BICUBIC.items() - settings.items():
            raise ValueError(
                f"{file.path}: its positions must be resized as transformers' Dinov2 does it "
                "(bicubic, to a given size, without antialiasing); the graph does it differently."
            )
        of_class = _class_position(file, resize)
        if of_class is None or "Slice" in passed:
            return None  # both are cut out of one named tensor
        patches = file.tensor(source)
        if patches.ndim == 4:  # [1, rows, columns, D] or [1, D, rows, columns]
            last = "Transpose" in passed
            patches = patches.flatten(1, 2) if last else patches.flatten(2).transpose(1, 2)
        if of_class.shape[::2] != patches.shape[::2]:
            return None  # not one position of the same width
        return torch.cat([of_class, patches], dim=1)
    return None


def _class_position(file: OnnxFile, resize: Any) -> Tensor | None:
    """The stored position [1, 1, D] of the class token, which is put before the resized ones."""
    name = resize.output[0]
    while not (joins := file.readers(name, "Concat")):
        if not (nodes := file.readers(name, *_RESHAPES)):
            return None
        name = nodes[0].output[0]
    first = joins[0].input[0]
    return file.tensor(first) if file.is_stored(first) else None


def _head_dim(file: OnnxFile, bias: str) -> int | None:
    """Width of a head, to which the queries are reshaped after their bias is added."""
    for add in file.readers(bias, "Add"):
        for reshape in file.readers(add.output[0], "Reshape"):
            shape = reshape.input[1]
            if join := file.maker(shape, "Concat"):
                shape = join.input[-1]
            if file.is_stored(shape) and file.tensor(shape).numel():
                return int(file.tensor(shape).flatten()[-1])
    return None
