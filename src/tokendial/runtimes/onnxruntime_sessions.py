"""Exported files in onnxruntime, in float32 or with 8-bit weights and activations."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendial.atomic import atomic_write
from tokendial.runtimes.exported_vit import Session

if TYPE_CHECKING:
    import numpy as np


def open_file(path: Path, precision: str, images: "np.ndarray | None") -> Session:
    """Load an exported file.

    Args:
        path: The ONNX file.
        precision: "fp32", or "int8" for linear layers in 8 bits.
        images: A batch as it will be given. Unused: a session takes any number of images.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    if precision == "int8":
        path = quantized(path)
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    names = [output.name for output in session.get_outputs()]

    def run(batch: "np.ndarray") -> dict[str, Any]:
        return dict(zip(names, session.run(names, {"images": batch}), strict=True))

    return run


def quantized(path: Path) -> Path:
    """Write a file beside an exported one whose linear layers compute in 8 bits; once only.

    Weights are rounded for each output channel. The range of activations is found while the model
    runs (dynamic quantisation), so no images are needed. Products of two activations, such as those
    of attention and those that compare tokens, stay in float32.

    Returns:
        The path of the 8-bit file.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_suffix(".int8.onnx")
    if out.exists():
        return out
    graph = onnx.load(path)
    # Shapes that the file states for its weights would contradict the ones that replace them.
    stored = {tensor.name for tensor in graph.graph.initializer}
    stated = [value for value in graph.graph.value_info if value.name not in stored]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(stated)
    # Shapes are inferred and constants folded already: onnxruntime warns if it is not told so.
    prepared = graph.metadata_props.add()
    prepared.key, prepared.value = "onnx.quant.pre_process", "onnxruntime.quant"
    with atomic_write(out) as temporary:
        quantize_dynamic(
            graph,
            temporary,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
    return out
