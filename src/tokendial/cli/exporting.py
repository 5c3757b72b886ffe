"""The command that writes a finished run for other programs: export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from tokendial.cli.app import USE_PANEL, app
from tokendial.cli.evaluation_output import int8_table
from tokendial.cli.options import CompensatorFolder, Degree, RunFolder

if TYPE_CHECKING:
    from tokendial.runs import Run

_ENDINGS = {"onnx": "onnx", "pt2": "pt2", "openvino": "xml"}


@app.command(rich_help_panel=USE_PANEL)
def export(
    run: RunFolder,
    degree: Degree = None,
    compensator: CompensatorFolder = None,
    degrees: Annotated[
        str | None,
        typer.Option(
            help="Several degrees, such as 0,4,8: ONNX or OpenVINO files that share one file of "
            "weights."
        ),
    ] = None,
    to: Annotated[
        Literal["onnx", "pt2", "openvino"],
        typer.Option(help="File format: ONNX, pt2 of torch.export, or OpenVINO."),
    ] = "onnx",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Fixed number of images per call (default: any number)."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings", help="Also give embeddings: what the model gives before its classifier."
        ),
    ] = False,
    feature_map: Annotated[
        bool,
        typer.Option(
            "--feature-map",
            help="Also give the features at every patch; merged tokens are copied back to all "
            "their positions.",
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="ONNX files whose linear layers compute in 8 bits. They are evaluated on the "
            "validation set first.",
        ),
    ] = False,
    max_loss: Annotated[
        float,
        typer.Option(
            min=0, help="With --int8: refuse files that lose more points of the main metric."
        ),
    ] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, or folder of a bundle (default: in RUN/export)."),
    ] = None,
) -> None:
    """Write the best model as an ONNX, OpenVINO or torch.export file, for other runtimes.

    Each file holds one degree of the dial. It is run on random images, and refused if its outputs
    differ from the model's.
    """
    from tokendial.export_files import export as export_model
    from tokendial.export_files import export_bundle
    from tokendial.runs import Run
    from tokendial.runs.compensated import load_compensated
    from tokendial.runs.degrees import degrees_to_show
    from tokendial.runs.export_facts import run_facts

    opened = Run(run)
    if degrees is not None and degree is not None:
        raise ValueError("degrees writes a bundle of several degrees: leave out --degree.")
    if int8:
        if batch is not None or compensator or embeddings or feature_map or to != "onnx":
            raise ValueError(
                "int8 writes ONNX files of logits for any batch: leave out --to, --batch, "
                "--compensator, --embeddings and --feature-map."
            )
        _export_int8(opened, degree, degrees, max_loss, out)
        return
    model, folder = load_compensated(opened, compensator), run / "export"
    facts = run_facts(opened, model)
    if degrees is None:
        path = out or folder / f"degree_{model.degree if degree is None else degree}.{_ENDINGS[to]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [
            export_model(
                model,
                path,
                degree=degree,
                batch=batch,
                facts=facts,
                embeddings=embeddings,
                feature_map=feature_map,
            )
        ]
    else:
        files = export_bundle(
            model,
            out or (folder / to if to == "openvino" else folder),
            degrees_to_show(model, degrees),
            to=to,
            batch=batch,
            facts=facts,
            embeddings=embeddings,
            feature_map=feature_map,
        )
    for exported in files:
        print(
            f"wrote {exported.path}: degree {exported.degree}, {exported.gmacs:.4g} GMACs, "
            f"outputs differ by {exported.difference:.1e}"
        )


def _export_int8(
    run: "Run", degree: int | None, degrees: str | None, max_loss: float, out: Path | None
) -> None:
    from tokendial.runs.degrees import degrees_to_show
    from tokendial.runs.export_int8 import export_int8, export_int8_bundle

    if degrees is not None:
        wanted = degrees_to_show(run.model(), degrees)
        files = export_int8_bundle(run, wanted, out, max_loss=max_loss / 100)
        Console().print(int8_table(files))
        print(f"wrote {files[0].path.parent}")
        return
    found = export_int8(run, out, degree=degree, max_loss=max_loss / 100)
    print(
        f"wrote {found.path}: degree {found.degree}, {found.metric} {found.after:.1%} "
        f"(float32: {found.before:.1%})"
    )
    if found.accuracy_lost is not None:
        lost = found.accuracy_lost.percent(sign=True)
        print(f"accuracy lost, in points with the 95 % interval: {lost}")
