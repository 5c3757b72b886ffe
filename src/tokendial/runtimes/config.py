"""The choice of a runtime: which program computes a model, and in which precision."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from tokendial.checks import check_choice
from tokendial.extras import check_installed
from tokendial.measure.timing import time_in_rounds
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.runtimes import onnxruntime_sessions, openvino_int8, openvino_sessions
from tokendial.runtimes.bundles import find_or_export
from tokendial.runtimes.exported_vit import ExportedViT, Session
from tokendial.tune import DTYPES, OptimizedViT, optimize

if TYPE_CHECKING:
    import numpy as np

RuntimeName = Literal["torch", "onnxruntime", "openvino", "auto"]
RuntimePrecision = Literal["fp32", "bf16", "fp16", "int8"]
StartedModel = DialViT | OptimizedViT | ExportedViT
"""What a runtime starts."""
PRECISIONS: dict[RuntimeName, tuple[RuntimePrecision, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "auto": ("fp32", "bf16", "fp16", "int8"),
}
"""Precisions of each runtime."""
_TOLERANCE = 1e-3
"""Largest difference of outputs between OpenVINO and PyTorch, as a share of the largest output."""
_EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OPENERS = {
    "onnxruntime": onnxruntime_sessions.open_file,
    "openvino": openvino_sessions.open_file,
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how a model computes. It is falsy if nothing differs from the plain model.

    Example:
        >>> from tokendial import Runtime
        >>> Runtime("openvino", precision="bf16")
        Runtime(name='openvino', precision='bf16', optimize=False, compile=False)

    Raises:
        ValueError: If the runtime does not have the precision, or `optimize` or `compile` is asked
            for outside of PyTorch.
    """

    name: RuntimeName = "torch"
    """PyTorch, onnxruntime or OpenVINO; "auto": the fastest one that is installed."""
    precision: RuntimePrecision = "fp32"
    """Precision of weights and activations. In PyTorch, half precision also runs `optimize`. "int8"
    computes linear layers in 8 bits, the rest in float32. OpenVINO then needs images to measure the
    ranges of activations on, see `start`."""
    optimize: bool = False
    """PyTorch: run `optimize` on the model first."""
    compile: bool = False
    """PyTorch: run `optimize` on the model first, and let it compile."""

    def __post_init__(self) -> None:
        check_choice("runtime", self.name, get_args(RuntimeName))
        check_choice(f"precision in {self.name}", self.precision, PRECISIONS[self.name])
        if (self.optimize or self.compile) and self.name not in ("torch", "auto"):
            raise ValueError(f"optimize and compile are for torch, got runtime {self.name}.")

    def __bool__(self) -> bool:
        return self != Runtime()

    @property
    def numerics(self) -> str:
        """What decides how numbers are rounded: float32 is alike everywhere, the rest is not."""
        return self.precision if self.precision == "fp32" else f"{self.name} {self.precision}"

    def start(
        self,
        model: DialViT,
        images: Tensor,
        *,
        degrees: Sequence[int] | None = None,
        folder: Path | None = None,
        feature_map: bool = False,
        calibration: Callable[[DialViT], Tensor] | None = None,
        mixed_sizes: bool = False,
        quiet: bool = False,
    ) -> StartedModel:
        """Make a model ready for inference.

        What was tried and measured is printed to standard error.

        Args:
            model: The model; it is left unchanged. onnxruntime and OpenVINO run exported files on
                the CPU, which are exact copies: they follow no later change of the model.
            images: A batch [B, 3, H, W] like those to come, on the model's device. Batches of this
                size are the fastest, unless `mixed_sizes` is set.
            degrees: Degrees to make ready; None: all.
            folder: Where exported files are kept for the next start; None: they are deleted.
            feature_map: Make `feature_map` of the result ready. Exported files then compute the map
                in place of embeddings, in every call.
            calibration: Called with the model if OpenVINO has no 8-bit files of it yet. Returns the
                images [N, 3, H, W] that the ranges of activations are measured on, prepared like
                those to come; about a hundred are enough. None: `images`.
            mixed_sizes: Batches come in many sizes, as in a server. OpenVINO then prepares for any
                size instead of for that of `images`, which saves memory, and a batch takes no
                longer than its own images need.
            quiet: Do not print that files are exported or calibrated.

        Returns:
            The model itself if nothing is to be done, or something that is called like it and has
            the same dial.

        Raises:
            ValueError: If a degree is not offered, a package is missing, the model cannot be
                exported, or all values of the images to calibrate on are equal.
        """
        return self.choose_and_start(
            model,
            images,
            degrees=degrees,
            folder=folder,
            feature_map=feature_map,
            calibration=calibration,
            mixed_sizes=mixed_sizes,
            quiet=quiet,
        )[1]

    def choose_and_start(
        self,
        model: DialViT,
        images: Tensor,
        *,
        degrees: Sequence[int] | None = None,
        folder: Path | None = None,
        feature_map: bool = False,
        calibration: Callable[[DialViT], Tensor] | None = None,
        mixed_sizes: bool = False,
        quiet: bool = False,
    ) -> "tuple[Runtime, StartedModel]":
        """As `start`; returns the runtime, too, which is the fastest one if this one is "auto"."""
        if not self:
            return self, model
        degrees = sorted({*(model.degrees if degrees is None else degrees)})
        if self.name == "auto":
            return self._fastest(
                model, images, degrees, folder, feature_map, calibration, mixed_sizes
            )
        if self.name == "torch":
            return self, self._optimized(model, images, degrees)
        check_installed(self.name, *_EXPORT_PACKAGES, self.name)
        with tempfile.TemporaryDirectory() as temporary:
            files = find_or_export(
                model, degrees, folder or Path(temporary), feature_map=feature_map, quiet=quiet
            )
            given = None if mixed_sizes else images.cpu().float().numpy()
            sessions: dict[int, Session] = {}
            if self.name == "openvino":
                first = openvino_sessions.open_file(files[degrees[0]], "fp32", given)
                _check_openvino(model, degrees[0], first, len(images))
                if self.precision == "fp32":
                    sessions[degrees[0]] = first
            if (self.name, self.precision) == ("openvino", "int8"):
                read = partial(calibration, model) if calibration else lambda: images
                files = _calibrated(files, read, quiet)
            for degree, path in files.items():
                if degree not in sessions:
                    sessions[degree] = _OPENERS[self.name](path, self.precision, given)
        return self, ExportedViT(model.anatomy, sessions, _first(model, degrees))

    def _optimized(self, model: DialViT, images: Tensor, degrees: Sequence[int]) -> OptimizedViT:
        dtype = None if self.precision == "fp32" else DTYPES[self.precision]
        fast = optimize(model, images, degrees=degrees, dtype=dtype, compile=self.compile)
        print(*fast.notes, *fast.trials, sep="\n", file=sys.stderr)
        return fast

    def _fastest(
        self,
        model: DialViT,
        images: Tensor,
        degrees: Sequence[int],
        folder: Path | None,
        feature_map: bool,
        calibration: Callable[[DialViT], Tensor] | None,
        mixed_sizes: bool,
    ) -> "tuple[Runtime, StartedModel]":
        """Start each runtime that is installed, and keep the one that is fastest along the dial."""
        runtimes: dict[RuntimeName, Runtime] = {}
        started: dict[RuntimeName, StartedModel] = {}
        ends = sorted({degrees[0], degrees[-1]})
        name: RuntimeName

        def start(name: RuntimeName, degrees: Sequence[int]) -> StartedModel:
            return runtimes[name].start(
                model,
                images,
                degrees=degrees,
                folder=folder,
                feature_map=feature_map,
                calibration=calibration,
                mixed_sizes=mixed_sizes,
            )

        for name, precisions in PRECISIONS.items():
            if name == "auto" or self.precision not in precisions or not _is_installed(name):
                continue
            in_torch = name == "torch"
            runtimes[name] = Runtime(name, self.precision, in_torch, in_torch and self.compile)
            try:
                # The other runtimes take seconds and memory for each degree.
                started[name] = start(name, degrees if in_torch else ends)
            except ValueError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
        if not started:
            raise ValueError(
                f"precision {self.precision} needs onnxruntime, which is not installed."
            )
        turns: list[tuple[RuntimeName, int]] = [
            (name, degree) for name in started for degree in ends
        ]

        def switch(turn: tuple[RuntimeName, int]) -> InferenceModel:
            name, degree = turn
            started[name].set_degree(degree)
            return started[name]

        def compute(present: InferenceModel) -> Tensor:
            return present.feature_map(images) if feature_map else present(images)

        with torch.inference_mode():
            timings = time_in_rounds(turns, switch, compute, device=images.device)
        seconds = dict.fromkeys(started, 0.0)
        for (name, _), timing in zip(turns, timings, strict=True):
            seconds[name] += timing.seconds
        fastest = min(seconds, key=seconds.__getitem__)
        for name, taken in seconds.items():
            chosen = " (chosen)" if name == fastest else ""
            print(f"{name} {self.precision}: {1e3 * taken:.1f} ms{chosen}", file=sys.stderr)
        fast = started.pop(fastest)
        started.clear()
        if fastest != "torch" and ends != degrees:
            fast = start(fastest, degrees)
        fast.set_degree(_first(model, degrees))
        return runtimes[fastest], fast


@torch.no_grad()
def _check_openvino(model: DialViT, degree: int, run: Session, count: int) -> None:
    """Raise a ValueError if OpenVINO computes an exported file otherwise than PyTorch the model.

    Files are compared in onnxruntime when they are written. OpenVINO computes some operators in
    another way, such as those that resize the positions of timm's NaFlex models.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *model.anatomy.input_shape, generator=generator)
    before, training = model.degree, model.training
    try:
        model.eval().set_degree(degree)
        wanted = model(images.to(model.device)).float().cpu()
    finally:
        model.train(training).set_degree(before)
    difference = float((torch.from_numpy(run(images.numpy())["logits"]) - wanted).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ValueError(
            f"openvino computes this model otherwise than torch (outputs differ by "
            f"{difference:.1e} in float32): use torch or onnxruntime."
        )


PLAIN = Runtime()
"""The plain model, in PyTorch."""


def _calibrated(
    files: Mapping[int, Path], images: Callable[[], Tensor], quiet: bool
) -> dict[int, Path]:
    """The 8-bit file of OpenVINO for each exported one; images are read if one is missing."""

    @cache
    def values() -> "np.ndarray":
        return images().cpu().float().numpy()

    return {
        degree: openvino_int8.quantized(path, values, quiet=quiet) for degree, path in files.items()
    }


def _first(model: DialViT, degrees: Sequence[int]) -> int:
    """The degree to start at: the model's own, if it is made ready."""
    return model.degree if model.degree in degrees else degrees[0]


def _is_installed(name: str) -> bool:
    return name == "torch" or all(find_spec(each) for each in (*_EXPORT_PACKAGES, name))
