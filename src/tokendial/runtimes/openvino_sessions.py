"""Exported files in OpenVINO, in float32 or bfloat16, or with 8-bit linear layers."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendial.runtimes.exported_vit import Session

if TYPE_CHECKING:
    import numpy as np


@cache
def _core() -> Any:
    """The one core of this process: models of one core share what they can."""
    import openvino

    return openvino.Core()


def _repeats(session: Any, images: "np.ndarray") -> bool:
    """Whether a compiled model gives the same outputs when it is called again.

    OpenVINO 2026.4 overwrites a constant of some graphs that are compiled for one batch size (such
    as the token sizes where the first layer merges half of the patches), so that every later call
    is wrong. The same graph for any batch size is right.
    """
    import numpy as np

    batch = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    # Copies, because the outputs may lie in memory that the next call writes to.
    first = [np.array(each, np.float32) for each in session(batch).values()]
    again = [np.array(each, np.float32) for each in session(batch).values()]
    return all(
        np.allclose(a, b, rtol=0, atol=1e-3 * max(1.0, float(np.abs(a).max())))
        for a, b in zip(first, again, strict=True)
    )


def open_file(path: Path, precision: str, images: "np.ndarray | None") -> Session:
    """Load and compile an exported file.

    Batches of the size of `images` run a model that is compiled for this size, which is up to 15 %
    faster. Somewhat smaller ones, down to half of it, are filled up. Other sizes run a model that
    is compiled for any size when the first of them comes, which takes as much memory again.

    Args:
        path: The ONNX file, or for "int8" the file of `openvino_int8.quantized`.
        precision: "fp32" or "bf16"; "int8" for a file with 8-bit linear layers and all else in
            float32.
        images: A batch as it will be given. None: batches of any size come equally often, so all
            of them run the model for any size.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads wait for their core while another process has it, and other cores idle:
        # then a batch takes twice as long.
        "ENABLE_CPU_PINNING": False,
    }

    import numpy as np

    graph = _core().read_model(path)

    @cache
    def compiled(*shape: int) -> Any:
        model = graph.clone()
        if shape:
            model.reshape(list(shape))
        return _core().compile_model(model, "CPU", settings)

    fixed = None
    if images is None:
        compiled()  # now, and not while the first batch waits
    elif _repeats(compiled(*images.shape), images):
        fixed = images.shape
    names = [name for output in graph.outputs for name in output.names]

    def run(batch: "np.ndarray") -> "dict[str, np.ndarray]":
        count = len(batch)
        if fixed and fixed[0] / 2 <= count < fixed[0]:
            rest = np.zeros((fixed[0] - count, *fixed[1:]), batch.dtype)
            batch = np.concatenate([batch, rest])
        session = compiled(*batch.shape) if batch.shape == fixed else compiled()
        results = session(batch)
        return {name: results[name][:count] for name in names}

    return run
