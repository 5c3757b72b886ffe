"""Models as files for other runtimes: ONNX, and torch.export's own format.

A file holds one degree of the dial, for any batch size or one. Several degrees make a bundle: a
graph for each, and one file of weights that all of them share. No graph adds up colliding indices
(a scatter with a reduction), which ONNX cannot average and some runtimes compute wrongly: merging
is gathers and a small matrix product there.

What a caller has to know stands in the file, as JSON: in an ONNX file's metadata by names that
begin with `tokendial.`, in torch.export's format in the extra file `tokendial.json`.
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
"""Endings of the files that can be written."""
FACTS = "tokendial.json"
"""Extra file in a .pt2 file that says what a caller has to know."""
_WEIGHTS = "weights.bin"
_SMALL = 1024
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written and compared with the model."""

    path: Path
    """The file."""
    degree: int
    """Degree of the dial that it runs at."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9."""
    difference: float
    """Largest difference between its logits and the model's, on random images."""


def run_facts(run: Run, model: DialViT) -> dict[str, Any]:
    """What a caller of a run's model has to know: classes, and how its images are prepared.

    Returns:
        `task`: classification (softmax), multi_label (sigmoid), video_classification, binary_masks
        (sigmoid) or segmentation. `classes`: names in the order of the logits. `short_side`: the
        pixels that images are resized to, in their proportions; null: to height and width of
        `input`, whatever their shape. `interpolation`: Pillow's. `crop`: height and width of the
        part in the middle; null: all. `divide_by`: 8-bit values by this, before `mean` and `std`.
        `range`: what is black and white in files of more than 8 bits; null: the ends of their
        type. Tasks that look at windows or views say so under `windows` and `clip`; then sides are
        resized until both cover `input`.
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
    slides = task.augment.test == "slide"
    return facts | {
        "task": "binary_masks" if isinstance(task, BinaryMasks) else "segmentation",
        "interpolation": "bilinear",
        "short_side": None,
        "crop": None,
        "windows": {"stride": task.augment.stride} if slides else None,
    }


def export(
    model: DialViT,
    out: str | Path,
    *,
    degree: int | None = None,
    batch: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model at one degree, run the file, and compare.

    Args:
        model: It stays as it is.
        out: File to write, which ends in .onnx (for onnxruntime, TensorRT, …) or .pt2 (for
            `torch.export.load`). One that is there is replaced.
        degree: Of the dial; None: the present one.
        batch: Images per call; None: any number.
        facts: What else the file should say, such as `run_facts`; the degree, `input` [3, H, W],
            `mean` and `std` always stand in it.

    Raises:
        ValueError: If the ending is another, `degree` is not offered, `batch` is below 1, packages
            are missing, or the file gives other logits than the model (then it is not kept).
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
    """Write several degrees as ONNX: `degree_D.onnx` each, `weights.bin` for all, `bundle.json`.

    Args:
        model: It stays as it is.
        out: Folder, made if it is missing.
        degrees: Of the dial.
        batch: Images per call; None: any number.
        facts: What else the files and `bundle.json` should say; see `export`.

    Raises:
        ValueError: As `export` does.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        export(model, folder / f"degree_{degree}.onnx", degree=degree, batch=batch, facts=facts)
        for degree in degrees
    ]
    _share_weights(folder, [each.path for each in found])
    told = {
        "files": {str(each.degree): each.path.name for each in found},
        "gmacs": {str(each.degree): each.gmacs for each in found},
        **_how_to_call(model),
        **(facts or {}),
    }
    with atomic_write(folder / "bundle.json") as path:
        path.write_text(json.dumps(told, indent=2) + "\n")
    return found


@torch.no_grad()
def _export(model: DialViT, path: Path, batch: int | None, facts: Mapping[str, Any]) -> Exported:
    # An example of one image would make the exporter take 1 for a constant.
    example = _images(model, batch or 2)
    any_number = {0: torch.export.Dim("batch", min=1, max=2**16)}
    skipped = model.skips_unread
    model.skips_unread = True  # a file gives logits and nothing else
    try:
        program = torch.export.export(
            model, (example,), dynamic_shapes=None if batch else {"images": any_number}
        )
    finally:
        model.skips_unread = skipped
    told = {**_how_to_call(model), "degree": model.degree, **facts}
    tried = [_images(model, count) for count in ([batch] if batch else [1, 3])]
    with atomic_write(path) as temporary:
        if path.suffix == ".onnx":
            _write_onnx(program, told, temporary)
            given = _run_onnx(temporary, tried)
        else:
            # By way of memory: torch's writer ends the process if the disk is full.
            written = BytesIO()
            torch.export.save(program, written, extra_files={FACTS: json.dumps(told)})
            temporary.write_bytes(written.getbuffer())
            module = torch.export.load(temporary).module()
            given = [module(images) for images in tried]
        wanted = [model(images) for images in tried]
        difference = max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True))
        scale = max(1.0, *(float(logits.abs().max()) for logits in wanted))
        if not difference <= _TOLERANCE * scale:
            raise ValueError(f"out: {path} would give other logits than the model ({difference}).")
    return Exported(path, model.degree, model.cost().gmacs, difference)


def _images(model: DialViT, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    like = next(model.parameters())
    images = torch.randn(count, *model.anatomy.input_shape, generator=generator)
    return images.to(like.device, like.dtype)


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {missing[0]}: pip install 'tokendial[export]'.")


def _write_onnx(program: Any, told: Mapping[str, Any], path: Path) -> None:
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
        {f"tokendial.{name}": json.dumps(value) for name, value in told.items()}
    )
    written.save(path)


def _name_batch(graph: Any) -> None:
    """Call the number of images `batch`, where torch has a name of its own for it."""
    # A side is a number, or has a formula such as 65*s34 as its value.
    symbol = getattr(graph.inputs[0].shape[0], "value", None)
    if symbol is None:
        return
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for place, side in enumerate(value.shape or ()):
            if formula := getattr(side, "value", None):
                value.shape[place] = re.sub(rf"\b{symbol}\b", "batch", formula)


def _stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """torch's stable sort: ONNX's TopK of all, which puts the first of equal values first."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(self, size, axis=dim, largest=bool(descending), sorted=True)


def _run_onnx(path: Path, batches: list[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"images": each.numpy()})[0]) for each in batches]


def _how_to_call(model: DialViT) -> dict[str, Any]:
    """What a caller has to know of the images."""
    mean, std = model.anatomy.statistics
    return {"input": list(model.anatomy.input_shape), "mean": list(mean), "std": list(std)}


def _share_weights(folder: Path, paths: list[Path]) -> None:
    """Move the weights of several graphs into one file, each once."""
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with atomic_write(folder / _WEIGHTS) as shared, shared.open("wb") as file:
        for path in paths:
            graph = onnx.load(path)
            for tensor in graph.graph.initializer:
                data = tensor.raw_data
                if len(data) < _SMALL:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in places:
                    places[key] = file.tell()
                    file.write(data)
                set_external_data(tensor, _WEIGHTS, offset=places[key], length=len(data))
                tensor.ClearField("raw_data")
            with atomic_write(path) as temporary:
                onnx.save(graph, temporary)
