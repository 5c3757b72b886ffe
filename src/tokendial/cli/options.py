"""Arguments and options that several commands share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from tokendial.runtimes import Runtime

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe such as image_folder; "
        "`tokendial recipes` lists them.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Fields of the recipe to change, such as train.epochs=10 data.root=/images.",
    ),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, as `tokendial train` writes it.")
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="Folder of a run or of a saved model, or name of a backbone: a timm model such as "
        "vit_small_patch14_dinov2, or transformers.CLASS.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights of a backbone that is given by its name: a file, or for transformers a "
        "folder or a name on the hub (default: timm's own, from the hub)."
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--img-size",
        min=1,
        help="Side of the images in pixels, for a timm model that is given by its name "
        "(default: the model's own).",
    ),
]
Degree = Annotated[
    int | None,
    typer.Option(
        help="Degree of the dial: 0 is full compute, higher is cheaper "
        "(default: the degree that the model was trained at)."
    ),
]
Degrees = Annotated[
    str,
    typer.Option(
        help="Degrees of the dial: a list 0,4,8, a range 0..16, a range with steps 0..16:4, "
        "all (every degree; of a long dial about ten, evenly spaced in cost), or every (each "
        "degree, also of a long dial)."
    ),
]
CompensatorFolder = Annotated[
    str | None,
    typer.Option(
        "--compensator",
        help="Folder of a compensator, which adapts the model to the degree (default: none).",
    ),
]
Optimize = Annotated[
    bool,
    typer.Option(
        "--optimize",
        help="First try several ways to run the model on this machine, and keep the fastest.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Also try torch.compile, which takes about a minute per degree; implies --optimize.",
    ),
]
RuntimeChoice = Literal["torch", "onnxruntime", "openvino", "auto"]
PrecisionChoice = Literal["fp32", "bf16", "fp16", "int8"]
PlainRuntimeOption = Annotated[
    RuntimeChoice,
    typer.Option(
        "--runtime",
        help="Program that computes the model. onnxruntime and openvino run exported files on the "
        "CPU, which are kept in RUN/runtime; auto measures which one is the fastest here.",
    ),
]
RuntimeOption = Annotated[
    RuntimeChoice | None,
    typer.Option(
        "--runtime",
        help="Program that computes the model. onnxruntime and openvino run exported files on the "
        "CPU, which are kept in RUN/runtime; auto measures which one is the fastest here (default: "
        "torch; what `tokendial tune` chose, if neither this nor --precision is given).",
    ),
]
"""Of commands on one run, which may be a tuned one."""
PrecisionOption = Annotated[
    PrecisionChoice | None,
    typer.Option(
        "--precision",
        help="Format of weights and activations. In torch, bf16 and fp16 imply --optimize, and "
        "need a processor that supports them. onnxruntime has fp32 and int8, openvino fp32, bf16 "
        "and int8. int8 computes linear layers in 8 bits; openvino calibrates it once, on training "
        "images of the run (default: fp32; see --runtime).",
    ),
]
PlainPrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option(
        "--precision",
        help="Format of weights and activations: fp32, bf16 or fp16 in torch, fp32 or int8 in "
        "onnxruntime, fp32, bf16 or int8 in openvino.",
    ),
]
"""Of commands that run the plain model in torch, where a half precision is nothing more, unless
another runtime is asked for."""


def runtime_of(
    runtime: RuntimeChoice | None,
    precision: PrecisionChoice | None,
    optimize: bool = False,
    compile: bool = False,
) -> "Runtime | None":
    """The runtime that --runtime, --precision, --optimize and --compile stand for.

    None: none of them is given.
    """
    from tokendial.runtimes import Runtime

    if runtime is None and precision is None and not (optimize or compile):
        return None
    return Runtime(runtime or "torch", precision or "fp32", optimize, compile)


def runtime_for(run: Path, asked: "Runtime | None") -> "Runtime":
    """The runtime that is asked for, else that of a tuned run, which is then named, or PyTorch."""
    from tokendial.runs import Run
    from tokendial.runs.started_runtime import own_runtime

    if asked is not None:
        return asked
    if own := own_runtime(Run(run)):
        print(f"runtime {own.name}, precision {own.precision}, as tuned", file=sys.stderr)
    return own
