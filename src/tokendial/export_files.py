"""Models as files for other runtimes: ONNX, OpenVINO's and torch.export's own formats.

A file holds one degree of the dial, for any batch size or a fixed one. Several degrees make a
bundle: one graph for each degree, and one file with the weights that all graphs share. A
torch.export file always holds its own weights, so there are bundles of the other two only. No graph
contains a scatter with a reduction: ONNX cannot average with it, and some runtimes compute it
wrongly. Merging is expressed by gathers and a small matrix product instead.

Each file says how to prepare images and read logits, as JSON: an ONNX file in its metadata, under
names that begin with `tokendial.`; a torch.export file in its extra file `tokendial.json`; an
OpenVINO file in its runtime information, under `tokendial`.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from tokendial.atomic import atomic_write
from tokendial.checks import check_choice
from tokendial.extras import check_installed
from tokendial.model.dial_vit import DialViT

FORMATS = (".onnx", ".pt2", ".xml")
"""File endings that `export` writes."""
FACTS = "tokendial.json"
"""Name of the extra file inside a .pt2 file that holds the facts about the model."""
BUNDLE = "bundle.json"
"""Name of the file in a bundle that lists its files."""
_BUNDLED = {"onnx": ".onnx", "openvino": ".xml"}
_WEIGHTS = "weights.bin"
_SMALL = 1024
_ALIGNMENT = 64
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that `export` has written and compared with the model."""

    path: Path
    """Path of the file."""
    degree: int
    """Degree of the dial that the file runs at."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9."""
    difference: float
    """Largest difference between the outputs of file and model, on random images."""


def export(
    model: DialViT,
    out: str | Path,
    *,
    degree: int | None = None,
    batch: int | None = None,
    facts: Mapping[str, Any] | None = None,
    embeddings: bool = False,
    feature_map: bool = False,
) -> ExportedFile:
    """Write a model at one degree to a file, run the file, and compare its outputs.

    The first output is `logits`.

    Args:
        model: The model to export; it is left unchanged.
        out: File to write, which ends in .onnx (for onnxruntime, TensorRT, ...), .pt2 (for
            `torch.export.load`) or .xml (for OpenVINO; the weights are in a .bin file beside it).
            An existing file is replaced.
        degree: Degree of the dial to export; by default the present one.
        batch: Fixed number of images per call; by default the file takes any number.
        facts: Further facts to store in the file, such as the names of the classes. The degree,
            `input` [3, H, W], `mean` and `std`, and the names of the `outputs` are always stored.
        embeddings: Also give what `DialViT.embeddings` returns, as the output `embeddings`.
        feature_map: Also give what `DialViT.feature_map` returns, as the output `feature_map`:
            features at every patch, all reductions undone.

    Returns:
        The file's path, degree and cost, and how far its outputs differ.

    Raises:
        ValueError: If `out` has another ending, `degree` is not offered, `batch` is below 1, a
            package is missing, or the file computes something else than the model (then it is not
            kept).

    Example:
        >>> import pathlib, tempfile, timm, tokendial as td
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> model = td.wrap(vit, reduce=td.ToMe(r=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = td.export(model, pathlib.Path(folder, "vit.pt2"), degree=1)
        >>> file.degree, file.difference < 1e-3
        (1, True)
    """
    path = Path(out)
    if path.suffix not in FORMATS:
        raise ValueError(f"out must end in {', '.join(FORMATS)}, got {path}.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    if path.suffix != ".pt2":
        check_installed("ONNX", "onnx", "onnxscript", "onnxruntime")
    if path.suffix == ".xml":
        check_installed("OpenVINO", "openvino")
    before, training = model.degree, model.training
    model.eval()
    try:
        if degree is not None:
            model.set_degree(degree)
        return _export(model, path, batch, facts or {}, output_names(embeddings, feature_map))
    finally:
        model.set_degree(before)
        model.train(training)


def export_bundle(
    model: DialViT,
    out: str | Path,
    degrees: Sequence[int],
    *,
    to: Literal["onnx", "openvino", "pt2"] = "onnx",
    batch: int | None = None,
    facts: Mapping[str, Any] | None = None,
    embeddings: bool = False,
    feature_map: bool = False,
) -> list[ExportedFile]:
    """Write several degrees: a graph `degree_D` for each, `weights.bin` for all, `bundle.json`.

    Args:
        model: The model to export; it is left unchanged.
        out: Folder to write to, created if it is missing. A bundle in it is replaced.
        degrees: Degrees of the dial to export.
        to: "onnx" for graphs that end in .onnx, "openvino" for .xml.
        batch: Fixed number of images per call; by default the files take any number.
        facts: Further facts to store in the files and in `bundle.json`; see `export`.
        embeddings: See `export`.
        feature_map: See `export`.

    Raises:
        ValueError: As `export` does, or if `to` is another format, such as "pt2".
    """
    if to == "pt2":
        raise ValueError(
            "degrees cannot share weights in pt2, whose files always hold their own: write each "
            "degree to a file of its own."
        )
    check_choice("to", to, tuple(_BUNDLED))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        export(
            model,
            folder / f"degree_{degree}{_BUNDLED[to]}",
            degree=degree,
            batch=batch,
            facts=facts,
            embeddings=embeddings,
            feature_map=feature_map,
        )
        for degree in degrees
    ]
    names = {each.degree: each.path.name for each in found}
    gmacs = {each.degree: each.gmacs for each in found}
    outputs = output_names(embeddings, feature_map)
    write_bundle(folder, names, gmacs, {**model_facts(model, outputs), **(facts or {})})
    return found


def write_bundle(
    folder: Path, names: Mapping[int, str], gmacs: Mapping[int, float], facts: Mapping[str, Any]
) -> None:
    """Make a bundle of exported files: their weights move into one file, and a list is written.

    Args:
        folder: The folder that the files lie in. Other files of an earlier bundle in it are
            deleted, because the weights that they read are replaced.
        names: The file of each degree, all of one format.
        gmacs: Multiply-accumulates of each degree, in 1e9.
        facts: Facts about the model.
    """
    listed = folder / BUNDLE
    if listed.exists():
        earlier = set(json.loads(listed.read_text())["files"].values())
        for name in earlier - set(names.values()):
            (folder / Path(name).name).unlink(missing_ok=True)
    with atomic_write(folder / _WEIGHTS) as shared, shared.open("wb") as file:
        weights = _SharedWeights(file)
        for name in names.values():
            move = _move_openvino_weights if name.endswith(".xml") else _move_onnx_weights
            move(folder / name, weights)
    contents = {"files": dict(names), "gmacs": dict(gmacs), **facts}  # JSON has degrees as texts
    with atomic_write(listed) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n")


def output_names(embeddings: bool = False, feature_map: bool = False) -> list[str]:
    """Names of the outputs that `export` gives a file, in their order."""
    further = {"embeddings": embeddings, "feature_map": feature_map}
    return ["logits", *(name for name, given in further.items() if given)]


class _Outputs(nn.Module):
    """Gives several outputs of a model."""

    def __init__(self, model: DialViT, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        further = {name: True for name in self.names if name != "logits"}
        outputs = self.model.logits_and_features(images, **further)
        return tuple(outputs[name] for name in self.names)


@torch.no_grad()
def _export(
    model: DialViT, path: Path, batch: int | None, facts: Mapping[str, Any], outputs: Sequence[str]
) -> ExportedFile:
    module = _Outputs(model, outputs) if len(outputs) > 1 else model
    skipped = model.skip_unread_patches
    model.skip_unread_patches = True  # unless a feature map is among the outputs
    try:
        program = _traced(module, _images(model, batch or 2), any_number=batch is None)
    finally:
        model.skip_unread_patches = skipped
    contents = {**model_facts(model, outputs), "degree": model.degree, **facts}
    with ExitStack() as files:
        temporary = files.enter_context(atomic_write(path))
        if path.suffix == ".onnx":
            _write_onnx(program, outputs, contents, temporary)
            run = _onnx_runner(temporary)
        elif path.suffix == ".xml":
            weights = files.enter_context(atomic_write(path.with_suffix(".bin")))
            _write_openvino(program, outputs, contents, temporary, weights)
            run = _openvino_runner(temporary, weights)
        else:
            # Written in memory first, because torch's writer ends the process if the disk is full.
            written = BytesIO()
            torch.export.save(program, written, extra_files={FACTS: json.dumps(contents)})
            temporary.write_bytes(written.getbuffer())
            # As bytes, because torch warns of files whose names end otherwise.
            run = torch.export.load(BytesIO(temporary.read_bytes())).module()
        difference = 0.0
        for images in [_images(model, count) for count in ([batch] if batch else [1, 3])]:
            pairs = zip(outputs, _as_tuple(run(images)), _as_tuple(module(images)), strict=True)
            for name, given, wanted in pairs:
                found = float((given - wanted).abs().max())
                if not found <= _TOLERANCE * max(1.0, float(wanted.abs().max())):
                    raise ValueError(
                        f"out: {path} would give other {name} than the model ({found})."
                    )
                difference = max(difference, found)
    return ExportedFile(path, model.degree, model.cost().gmacs, difference)


def write_onnx(module: nn.Module, example: Tensor, path: Path, outputs: Sequence[str]) -> None:
    """Write any function of images as ONNX, in the way of `export`; nothing is compared.

    Args:
        module: Takes images [B, 3, H, W].
        example: At least two images.
        path: File to write.
        outputs: Names of the outputs.
    """
    _write_onnx(_traced(module, example, any_number=True), outputs, {}, path)


def _traced(
    module: nn.Module, example: Tensor, *, any_number: bool
) -> torch.export.ExportedProgram:
    """The graph of a function of images, for the number of the example or for any number."""
    # With an example of one image, the exporter would treat the batch size as the constant 1.
    sizes = {"images": {0: torch.export.Dim("batch", min=1, max=2**16)}} if any_number else None
    return torch.export.export(module, (example,), dynamic_shapes=sizes)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _images(model: DialViT, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    like = next(model.parameters())
    images = torch.randn(count, *model.anatomy.input_shape, generator=generator)
    return images.to(like.device, like.dtype)


def _write_onnx(
    program: torch.export.ExportedProgram,
    outputs: Sequence[str],
    contents: Mapping[str, Any],
    path: Path,
) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=outputs,
        custom_translation_table={
            torch.ops.aten.sort.default: _sort,
            torch.ops.aten.sort.stable: _stable_sort,
        },
        verbose=False,
    )
    assert written is not None
    graph = written.model.graph
    _name_batch(graph)
    _split_products(graph)
    written.model.metadata_props.update(
        {f"tokendial.{name}": json.dumps(value) for name, value in contents.items()}
    )
    written.save(path)


def _name_batch(graph: Any) -> None:
    """Name the batch dimension `batch` instead of the symbol that torch chose."""
    # A dimension is a number, or has a formula such as 65*s34 as its value.
    symbol = getattr(graph.inputs[0].shape[0], "value", None)
    if symbol is None:
        return
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for place, side in enumerate(value.shape or ()):
            if formula := getattr(side, "value", None):
                value.shape[place] = re.sub(rf"\b{symbol}\b", "batch", formula)


def _split_products(graph: Any) -> None:
    """Compute the parts of a linear layer's output, such as queries, keys and values, one by one.

    Other runtimes copy the parts of one large output, which takes longer than smaller products.
    """
    import numpy as np
    import onnx_ir

    for split in [node for node in graph if node.op_type == "Split"]:
        add, size = split.inputs[0].producer(), len(split.outputs)
        last = len(split.inputs[0].shape) - 1
        if "num_outputs" not in split.attributes or split.attributes["axis"].as_int() != last:
            continue  # unequal parts, or parts of the tokens
        product = add.inputs[0].producer() if add is not None and add.op_type == "Add" else None
        if product is None or product.op_type != "MatMul":
            continue
        stored = [product.inputs[1], add.inputs[1]]
        used_once = all(len(node.outputs[0].uses()) == 1 for node in (product, add))
        if not used_once or any(value.const_value is None for value in stored):
            continue
        weights, biases = (np.split(value.const_value.numpy(), size, axis=-1) for value in stored)
        for number, output in enumerate(split.outputs):
            parts = []
            for value, array in zip(stored, (weights[number], biases[number]), strict=True):
                name = f"{value.name}.{number}"
                parts.append(onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name)))
                graph.initializers.add(parts[-1])
            part = onnx_ir.node("MatMul", [product.inputs[0], parts[0]])
            shifted = onnx_ir.node("Add", [part.outputs[0], parts[1]])
            shifted.outputs[0].shape, shifted.outputs[0].type = output.shape, output.type
            graph.insert_before(split, [part, shifted])
            output.replace_all_uses_with(shifted.outputs[0])
        graph.remove([split, add, product], safe=True)
        for value in stored:
            if not value.uses():
                del graph.initializers[value.name]


def _sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
    """Express torch's sort by ONNX's TopK of all, which keeps equal values in order."""
    from onnxscript import opset18

    op: Any = opset18
    # A number, which TensorRT needs: counts of tokens are fixed.
    count = op.Constant(value_ints=[self.shape[dim]])
    return op.TopK(self, count, axis=dim, largest=bool(descending), sorted=True)


def _stable_sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """Express torch's stable sort, as `_sort` does."""
    return _sort(self, dim, descending)


def _onnx_runner(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: tuple(
        map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    )


def _write_openvino(
    program: Any, outputs: Sequence[str], contents: Mapping[str, Any], path: Path, weights: Path
) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        _write_onnx(program, outputs, {}, onnx)
        model = openvino.Core().read_model(onnx)
        for name, value in contents.items():
            model.set_rt_info(json.dumps(value), ["tokendial", name])
        written = Path(folder, "model.xml")  # OpenVINO writes to names with this ending only
        openvino.serialize(model, written)
        shutil.copyfile(written, path)
        shutil.copyfile(written.with_suffix(".bin"), weights)


def _openvino_runner(path: Path, weights: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    import numpy as np
    import openvino

    core = openvino.Core()
    values = openvino.Tensor(np.frombuffer(weights.read_bytes(), np.uint8))
    # By default OpenVINO computes in half precision where a processor has it.
    whole = {"INFERENCE_PRECISION_HINT": "f32"}
    session = core.compile_model(core.read_model(path.read_bytes(), values), "CPU", whole)
    return lambda images: tuple(map(torch.from_numpy, session(images.numpy()).values()))


def model_facts(model: DialViT, outputs: Sequence[str]) -> dict[str, Any]:
    """Shape and normalisation of the images that the model takes, and the names of its outputs."""
    mean, std = model.anatomy.statistics
    images = {"input": list(model.anatomy.input_shape), "mean": list(mean), "std": list(std)}
    return images | {"outputs": list(outputs)}


class _SharedWeights:
    """A file in which the weights of several graphs are stored, equal ones once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def place(self, data: bytes) -> int:
        """Offset of a tensor's bytes in the file; they are written if they are new."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            # Runtimes that map the file into memory need tensors at multiples of their width.
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[key] = self._file.tell()
            self._file.write(data)
        return self._places[key]


def _move_onnx_weights(path: Path, weights: _SharedWeights) -> None:
    import onnx
    from onnx.external_data_helper import set_external_data

    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        data = tensor.raw_data
        if len(data) < _SMALL:
            continue
        set_external_data(tensor, _WEIGHTS, offset=weights.place(data), length=len(data))
        tensor.ClearField("raw_data")
    with atomic_write(path) as temporary:
        onnx.save(graph, temporary)


def _move_openvino_weights(path: Path, weights: _SharedWeights) -> None:
    own = path.with_suffix(".bin")
    data = own.read_bytes()

    def moved(place: re.Match[str]) -> str:
        start, size = map(int, place.groups())
        return f'offset="{weights.place(data[start : start + size])}" size="{size}"'

    with atomic_write(path) as temporary:
        temporary.write_text(re.sub(r'offset="(\d+)" size="(\d+)"', moved, path.read_text()))
    own.unlink()
