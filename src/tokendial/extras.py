"""Optional packages: the extra of Tokendial that brings each, and the error when one is missing."""

from importlib.util import find_spec

EXTRAS = {
    "accelerate": ("accelerate", "runs"),
    "av": ("av", "video"),
    "datasets": ("datasets", "hf"),
    "elpv_dataset": ("elpv-dataset", "real"),
    "fastapi": ("fastapi", "serve"),
    "h11": ("h11", "serve"),
    "matplotlib": ("matplotlib", "runs"),
    "nncf": ("nncf", "openvino"),
    "numpy": ("numpy", "runs"),
    "onnx": ("onnx", "export"),
    "onnx_ir": ("onnx-ir", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
    "open_clip": ("open_clip_torch", "openclip"),
    "openvino": ("openvino", "openvino"),
    "peft": ("peft", "peft"),
    "PIL": ("pillow", "runs"),
    "prometheus_client": ("prometheus-client", "serve"),
    "py_sod_metrics": ("pysodmetrics", "masks"),
    "pyarrow": ("pyarrow", "hf"),
    "pydantic": ("pydantic", "runs"),
    "pydantic_core": ("pydantic", "runs"),
    "python_multipart": ("python-multipart", "serve"),
    "ray": ("ray", "ray"),
    "rich": ("rich", "train"),
    "scipy": ("scipy", "matlab"),
    "starlette": ("starlette", "serve"),
    "tensorboard": ("tensorboard", "train"),
    "torchmetrics": ("torchmetrics", "runs"),
    "torchvision": ("torchvision", "runs"),
    "transformers": ("transformers", "transformers"),
    "typer": ("typer", "cli"),
    "uvicorn": ("uvicorn", "serve"),
    "yaml": ("pyyaml", "runs"),
}
"""Name of the package and of the extra that brings it, by the name that is imported."""


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed.

    It is an `ImportError`, as Python users expect. It is a `ValueError` too, because the command
    line and the server report each ValueError in one line, without a traceback.
    """


def check_installed(feature: str, *modules: str) -> None:
    """Check that optional packages are installed, before they are imported.

    Args:
        feature: What needs them, for the message, such as "LoRA".
        modules: Names in `EXTRAS`.

    Raises:
        MissingPackageError: If one is missing; the message names the extra that brings it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingPackageError(f"{feature} needs {install_hint(module)}", name=module)


def install_hint(module: str) -> str:
    """Say that an optional package is missing, and how to install it."""
    package, extra = EXTRAS[module]
    return f"{package}, which is not installed: pip install 'tokendial[{extra}]'"
