"""Read the weights of a decoder of transposed convolutions from an exported ONNX file."""

from typing import Any

import torch
from torch import Tensor

from tokendial.backbones.onnx_file import OnnxFile, attributes
from tokendial.decode.upconv import KERNEL, PADDING, STRIDE, UpConvDecoder
from tokendial.weights import check_finite

_UP = {
    "kernel_shape": [KERNEL] * 2,
    "strides": [STRIDE] * 2,
    "pads": [PADDING] * 4,
    "dilations": [1, 1],
    "group": 1,
}
_PREDICT = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "group": 1}
_EPSILON = 1e-5
_RESHAPES = ("Cast", "Identity", "Reshape", "Slice", "Transpose")
"""Types of nodes that make the map of patches from the tokens after the final norm."""


def read_decoder(file: OnnxFile) -> tuple[UpConvDecoder, dict[str, Tensor]]:
    """Find the decoder that reads the patches of a Dinov2 encoder after the final norm.

    The decoder is recognised by the graph: transposed convolutions, each followed by BatchNorm and
    ReLU, then a 1x1 convolution. What the graph does with its logits is not read.

    Args:
        file: The file of the whole model.

    Returns:
        The settings of the decoder, and its weights by the names of the module that they build.

    Raises:
        ValueError: If the file holds no such decoder.
    """
    ups = [node for node in file.nodes if node.op_type == "ConvTranspose"]
    if not ups or not _follows_the_norm(file, ups[0].input[0]):
        raise _error(file, "no transposed convolution reads the patches after the final norm")
    state: dict[str, Tensor] = {}
    value = ups[0].input[0]
    for number, up in enumerate(ups):
        norm = _reader(file, up.output[0], "BatchNormalization")
        act = _reader(file, norm.output[0], "Relu")
        if up.input[0] != value or _differs(up, _UP):
            raise _error(
                file,
                f"transposed convolution {number + 1} must follow the one before, with kernel "
                f"{KERNEL}, stride {STRIDE} and padding {PADDING}",
            )
        if abs(attributes(norm).get("epsilon", _EPSILON) - _EPSILON) > 1e-9:
            raise _error(file, f"the epsilon of BatchNorm {number + 1} must be {_EPSILON}")
        state |= _convolution(file, up, f"stages.{number}.up", channel_axis=1)
        names = ("weight", "bias", "running_mean", "running_var")
        for name, stored in zip(names, norm.input[1:], strict=True):
            state[f"stages.{number}.norm.{name}"] = _stored(file, stored)
        value = act.output[0]
    predict = _reader(file, value, "Conv")
    if _differs(predict, _PREDICT):
        raise _error(file, "the last convolution must have kernel 1")
    state |= _convolution(file, predict, "predict", channel_axis=0)
    check_finite(state, file.path)
    channels = [len(state[f"stages.{number}.up.bias"]) for number in range(len(ups))]
    classes = len(state["predict.bias"])
    return UpConvDecoder(channels=tuple(channels), num_classes=classes), state


def _convolution(file: OnnxFile, node: Any, name: str, *, channel_axis: int) -> dict[str, Tensor]:
    """Weight and bias of a convolution; a bias that is missing is zero."""
    weight = _stored(file, node.input[1])
    no_bias = torch.zeros(weight.shape[channel_axis])
    bias = _stored(file, node.input[2]) if len(node.input) > 2 else no_bias
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _stored(file: OnnxFile, name: str) -> Tensor:
    if not file.is_stored(name):
        raise _error(file, f"{name} must be stored in the file")
    return file.tensor(name)


def _reader(file: OnnxFile, value: str, op_type: str) -> Any:
    """The only node of a type that reads a value."""
    nodes = file.readers(value, op_type)
    if len(nodes) != 1:
        raise _error(file, f"{value} must be read by one {op_type}, found {len(nodes)}")
    return nodes[0]


def _differs(node: Any, wanted: dict[str, Any]) -> bool:
    settings = attributes(node)
    return any(settings.get(name, value) != value for name, value in wanted.items()) or any(
        settings.get("output_padding", ())
    )


def _follows_the_norm(file: OnnxFile, value: str) -> bool:
    """Whether a value holds tokens after the encoder's final norm, in another shape."""
    while node := file.maker(value, *_RESHAPES):
        value = node.input[0]
    norm = file.maker(value, "LayerNormalization", "Add")
    return norm is not None and any(name.endswith("layernorm.bias") for name in norm.input)


def _error(file: OnnxFile, problem: str) -> ValueError:
    return ValueError(
        f"{file.path} holds no decoder that is known (transposed convolutions with BatchNorm and "
        f"ReLU, then a 1x1 convolution): {problem}."
    )
