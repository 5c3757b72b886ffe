"""Speed of exported files in onnxruntime: ToMe, EViT and DAR compared with plain timm.

All are exported in the same way. The column "difference" is the largest difference between logits
of a file and of its model in PyTorch.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import tokendial as td
from benchmarks.alternating import Runner
from benchmarks.models import backbone, degrees_at, random_images, with_reduction
from benchmarks.options import add_model, comma_separated, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report
from benchmarks.speed import MEASURES, Contender, compare
from tokendial.export_files import export

COLUMNS = (
    Column("method", "method"),
    Column("degree", "degree"),
    *MEASURES,
    Column("difference", "difference", "{:.1e}"),
)


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("onnx", __doc__, repeats=5)
    add_model(parser, default="vit_small_patch16_224")
    parser.add_argument("--methods", type=comma_separated(str), default=["tome", "evit", "dar"])
    parser.add_argument("--costs", type=comma_separated(float), default=[0.85, 0.7, 0.55])
    parser.add_argument("--batch", type=int, default=1)
    asked = parse_options(parser, arguments, costs=[0.6])
    vit = backbone(asked.model, img_size=asked.img_size, device="cpu")
    images = random_images(vit, asked.batch)
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(_contenders(vit, images, Path(folder), asked.methods, asked.costs))
        rows = compare(contenders, batch=asked.batch, repeats=asked.repeats, device="cpu")
    figure = cost_figure(rows, ())
    Report(f"onnx_{asked.model}", COLUMNS, rows, figure).write(asked)


def _contenders(
    vit: nn.Module, images: Tensor, folder: Path, methods: list[str], costs: list[float]
) -> Iterator[Contender]:
    gmacs = td.wrap(vit).cost().gmacs
    path = folder / "timm.onnx"
    with torch.no_grad():
        program = torch.export.export(vit, (images,))
        torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False).save(path)
        runner = _session(path, images)
        difference = float((runner.call() - vit(images)).abs().max())
    yield Contender(_labels("timm", 0, difference), gmacs, runner)
    for method in methods:
        model = with_reduction(vit, method, images)
        for degree in degrees_at(model, costs):
            path = folder / f"{method}_{degree}.onnx"
            exported = export(model, path, degree=degree, batch=len(images))
            labels = _labels(method, degree, exported.difference)
            gmacs = model.cost(degree).gmacs
            yield Contender(labels, gmacs, _session(path, images))


def _labels(method: str, degree: int, difference: float) -> dict[str, object]:
    return {"method": method, "degree": degree, "difference": difference}


def _session(path: Path, images: Tensor) -> Runner:
    """A runner of an ONNX file, with as many threads as PyTorch has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), settings, providers=["CPUExecutionProvider"]
    )
    given = {"images": images.numpy()}
    return Runner(lambda: torch.from_numpy(session.run(None, given)[0]), seen=False)
