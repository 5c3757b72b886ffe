"""Exported files with 8-bit linear layers for OpenVINO, made by NNCF, its quantisation library."""

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendial.atomic import atomic_write
from tokendial.extras import check_installed

if TYPE_CHECKING:
    import numpy as np

_BATCH = 8
"""Images of one forward pass while ranges are measured."""
_VALUES = ("Constant", "Parameter", "Result")
"""Types of nodes that compute nothing."""


def quantized(path: Path, images: "Callable[[], np.ndarray]", *, quiet: bool = False) -> Path:
    """Write a file beside an exported one whose linear layers compute in 8 bits; once only.

    Weights are rounded for each output channel, activations by one range for each linear layer,
    which is measured on images (static post-training quantisation). Before that, large channels of
    activations are scaled down and the weights that read them up (SmoothQuant). All else stays in
    float32: attention's products, the comparison and choice of tokens, merging.

    Args:
        path: The ONNX file.
        images: Called if there is no such file yet. Gives normalised images [N, 3, H, W] to
            calibrate on.
        quiet: Do not print that it is written.

    Returns:
        The path of the 8-bit file, which ends in .xml; its weights are in a .bin file beside it.

    Raises:
        ValueError: If NNCF is missing, or all values of the images are equal.

    Source: SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438), in NNCF for transformers.
    """
    out = path.with_suffix(".int8.xml")
    if out.exists():
        return out
    check_installed("int8 in openvino", "nncf")
    given = images()
    if given.min() == given.max():
        raise ValueError(
            "int8 in openvino is calibrated on images like those to come, got a batch whose values "
            f"are all {given.min():g}."
        )
    import openvino

    if not quiet:
        print(f"calibrating {path.stem} in 8 bits on {len(given)} images: once", file=sys.stderr)
    model = _quantize(openvino.Core().read_model(path), given)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.xml")
        openvino.save_model(model, written, compress_to_fp16=False)
        # The .xml file comes last: where it is, the weights are too.
        for ending in (".bin", ".xml"):
            with atomic_write(out.with_suffix(ending)) as temporary:
                shutil.copyfile(written.with_suffix(ending), temporary)
    return out


def _quantize(model: Any, images: "np.ndarray") -> Any:
    # NNCF reports its use to a server of its makers, unless this variable is set.
    os.environ.setdefault("NNCF_CI", "1")
    kind = logging.getLoggerClass()
    import nncf

    # Importing it makes every later logger of the process one of its own class, and its own
    # function for levels changes handlers of others.
    logging.setLoggerClass(kind)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    others = [
        node.get_friendly_name()
        for node in model.get_ops()
        if not is_linear(node) and node.get_type_name() not in _VALUES
    ]
    batches = [images[first : first + _BATCH] for first in range(0, len(images), _BATCH)]
    # Its progress bars go to standard output, where commands print their answers.
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            # Without a check that NNCF has every name: it leaves calculations of shapes out itself.
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
        )


def is_linear(node: Any) -> bool:
    """Whether a node of an OpenVINO graph is a product with stored weights: a linear layer."""
    if node.get_type_name() != "MatMul":
        return False
    kind: str = node.input_value(1).get_node().get_type_name()
    return kind == "Constant"
