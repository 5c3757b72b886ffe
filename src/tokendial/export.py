"""Export of models to files for other runtimes: ONNX, and the format of torch.export.

A file holds one degree of the dial, for one batch size or for any. Several degrees make a bundle:
one ONNX graph per degree, and one file of weights that all graphs share. Exported graphs merge
tokens by gathers and a small matrix product. They contain no scatter that reduces colliding
indices, because ONNX has none that averages and some runtimes compute them wrongly.

Each file describes itself: classes, and how images are prepared, as JSON. ONNX files hold it in
their metadata, under names that begin with `tokendial.`; .pt2 files in the extra file
`tokendial.json`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.transforms.image import CentreCropped
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.tasks import BinaryMasks, Classification, Segmentation, VideoClassification

FORMATS = (".onnx", ".pt2")
"""Suffixes of the files that `export` can write."""
FACTS = "tokendial.json"
"""Name of the extra file in a .pt2 file that holds its description as JSON."""
_WEIGHTS = "weights.bin"
_MIN_SHARED_BYTES = 1024
"""Smaller tensors stay in each graph of a bundle."""
_TOLERANCE = 1e-4
"""Largest allowed difference between the logits of a file and those of the model."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported file, whose logits were compared with the model's."""

    path: Path
    """Path of the file."""
    degree: int
    """Degree of the dial that the file computes."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9."""
    difference: float
    """Largest absolute difference between logits of the file and of the model, on random images."""


def run_facts(run: Run, model: DialViT) -> dict[str, Any]:
    """Describe a run's model to the callers of an exported file: classes, and image preparation.

    Returns:
        A mapping with these keys.
        `task`: "classification" (softmax), "multi_label" (sigmoid), "video_classification",
        "binary_masks" (sigmoid) or "segmentation".
        `classes`: names of the classes, in the order of the logits.
        `short_side`: images are resized until their short side has so many pixels, with their
        proportions kept; None: they are resized to the height and width of `input`.
        `interpolation`: name of the interpolation, as in Pillow.
        `crop`: height and width of the centre crop after resizing; None: no crop.
        `divide_by`: 8-bit pixel values are divided by this, before `mean` and `std` are applied.
        `range`: pixel values that are black and white in files of more than 8 bits; None: the
        limits of their type.
        `windows` and `clip`: present for tasks that run on windows of an image, or on views of a
        video; images are then resized until both sides cover `input`.
    """
    task = run.task()
    facts: dict[str, Any] = {"task": "", "classes": list(run.classes()), "divide_by": 255}
    facts["range"] = run.value_range()
    if isinstance(task, VideoClassification):
        facts |= {"task": "video_classification", "clip": asdict(task.clip)}
        return facts | {"interpolation": "bicubic", "short_side": None, "crop": None}
    if isinstance(task, Classification):
        transform: Any = task.image_transform(model.anatomy)
        resize = transform.transforms[0]
        cropped = isinstance(resize, CentreCropped)
        return facts | {
            "task": "multi_label" if task.multi_label else "classification",
            "interpolation": "bicubic",
            "short_side": resize.short if cropped else None,
            "crop": list(resize.size) if cropped else None,
        }
    assert isinstance(task, BinaryMasks | Segmentation)  # there are no other tasks
    in_windows = task.augment.test == "slide"
    return facts | {
        "task": "binary_masks" if isinstance(task, BinaryMasks) else "segmentation",
        "interpolation": "bilinear",
        "short_side": None,
        "crop": None,
        "windows": {"stride": task.augment.stride} if in_windows else None,
    }


def export(
    model: DialViT,
    out: str | Path,
    *,
    degree: int | None = None,
    batch: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Export a model at one degree, run the file on random images, and compare the logits.

    Args:
        model: A wrapped model. It is not changed.
        out: File to write, ending in .onnx (for onnxruntime, TensorRT, ...) or .pt2 (for
            `torch.export.load`). An existing file is replaced.
        degree: Degree of the dial. None means the model's present degree.
        batch: Fixed number of images per call. None allows any number.
        facts: Further description to store in the file, such as `run_facts` gives. The degree,
            `input` [3, H, W], `mean` and `std` are always stored.

    Returns:
        The file, its cost, and how far its logits differ from the model's.

    Raises:
        ValueError: If `out` has another suffix, `degree` is not offered, `batch` is below 1,
            packages are missing, or the logits differ too much (the file is then not kept).
    """
    path = Path(out)
    if path.suffix not in FORMATS:
        raise ValueError(f"out must end in {' or '.join(FORMATS)}, got {path}.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    if path.suffix == ".onnx":
        _check_onnx()
    before, training = model.degree, model.training
    model.eval()
    try:
        if degree is not None:
            model.set_degree(degree)
        return _export(model, path, batch, facts or {})
    finally:
        model.set_degree(before)
        model.train(training)


def export_bundle(
    model: DialViT,
    out: str | Path,
    degrees: Sequence[int],
    *,
    batch: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Exported]:
    """Export several degrees as ONNX files that share their weights.

    The folder gets `degree_D.onnx` for each degree D, `weights.bin` with the weights of all, and
    `bundle.json`, which lists the files and their costs.

    Args:
        model: A wrapped model. It is not changed.
        out: Folder, made if it is missing.
        degrees: Degrees of the dial.
        batch: Fixed number of images per call. None allows any number.
        facts: Further description to store in the files and in `bundle.json`; see `export`.

    Returns:
        One entry per degree.

    Raises:
        ValueError: If `export` raises one.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    exported = [
        export(model, folder / f"degree_{degree}.onnx", degree=degree, batch=batch, facts=facts)
        for degree in degrees
    ]
    _share_weights(folder, [each.path for each in exported])
    description = {
        "files": {str(each.degree): each.path.name for each in exported},
        "gmacs": {str(each.degree): each.gmacs for each in exported},
        **_input_format(model),
        **(facts or {}),
    }
    with atomic_write(folder / "bundle.json") as path:
        path.write_text(json.dumps(description, indent=2) + "\n")
    return exported


@torch.no_grad()
def _export(model: DialViT, path: Path, batch: int | None, facts: Mapping[str, Any]) -> Exported:
    # With an example of one image the exporter would treat the batch size 1 as a constant.
    example = _random_images(model, batch or 2)
    any_number = {0: torch.export.Dim("batch", min=1, max=2**16)}
    skipped = model.skips_unread
    model.skips_unread = (
        True  # files return logits only, so patches that the head ignores are skipped
    )
    try:
        program = torch.export.export(
            model, (example,), dynamic_shapes=None if batch else {"images": any_number}
        )
    finally:
        model.skips_unread = skipped
    description = {**_input_format(model), "degree": model.degree, **facts}
    batches = [_random_images(model, count) for count in ([batch] if batch else [1, 3])]
    with atomic_write(path) as temporary:
        if path.suffix == ".onnx":
            _write_onnx(program, description, temporary)
            actual = _run_onnx(temporary, batches)
        else:
            # Through memory, because torch's file writer aborts the process on a full disk.
            buffer = BytesIO()
            torch.export.save(program, buffer, extra_files={FACTS: json.dumps(description)})
            temporary.write_bytes(buffer.getbuffer())
            module = torch.export.load(temporary).module()
            actual = [module(images) for images in batches]
        expected = [model(images) for images in batches]
        difference = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
        scale = max(1.0, *(float(logits.abs().max()) for logits in expected))
        if not difference <= _TOLERANCE * scale:
            raise ValueError(f"out: {path} would give other logits than the model ({difference}).")
    return Exported(path, model.degree, model.cost().gmacs, difference)


def _random_images(model: DialViT, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    like = next(model.parameters())
    images = torch.randn(count, *model.anatomy.input_shape, generator=generator)
    return images.to(like.device, like.dtype)


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {missing[0]}: pip install 'tokendial[export]'.")


def _write_onnx(program: Any, description: Mapping[str, Any], path: Path) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        verbose=False,
    )
    assert written is not None
    _name_batch(written.model.graph)
    written.model.metadata_props.update(
        {f"tokendial.{name}": json.dumps(value) for name, value in description.items()}
    )
    written.save(path)


def _name_batch(graph: Any) -> None:
    """Rename the symbol that torch gave the batch size to `batch`."""
    # A dimension is a number, or its value is a formula with the symbol, such as 65*s34.
    symbol = getattr(graph.inputs[0].shape[0], "value", None)
    if symbol is None:
        return
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for index, dimension in enumerate(value.shape or ()):
            if formula := getattr(dimension, "value", None):
                value.shape[index] = re.sub(rf"\b{symbol}\b", "batch", formula)


def _stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """torch's stable sort as ONNX's TopK of all values, which keeps equal values in order."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(self, size, axis=dim, largest=bool(descending), sorted=True)


def _run_onnx(path: Path, batches: list[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"images": each.numpy()})[0]) for each in batches]


def _input_format(model: DialViT) -> dict[str, Any]:
    """The shape and the normalisation of the images that the model takes."""
    mean, std = model.anatomy.statistics
    return {"input": list(model.anatomy.input_shape), "mean": list(mean), "std": list(std)}


def _share_weights(folder: Path, paths: list[Path]) -> None:
    """Move the weights of several graphs into one file, equal tensors only once."""
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with atomic_write(folder / _WEIGHTS) as shared, shared.open("wb") as file:
        for path in paths:
            graph = onnx.load(path)
            for tensor in graph.graph.initializer:
                data = tensor.raw_data
                if len(data) < _MIN_SHARED_BYTES:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in places:
                    places[key] = file.tell()
                    file.write(data)
                set_external_data(tensor, _WEIGHTS, offset=places[key], length=len(data))
                tensor.ClearField("raw_data")
            with atomic_write(path) as temporary:
                onnx.save(graph, temporary)
