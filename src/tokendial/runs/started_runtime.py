"""Models of runs in the runtime that computes them."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.runs.training_images import calibration_images
from tokendial.runtimes import Runtime
from tokendial.runtimes.exported_vit import ExportedViT
from tokendial.tune import OptimizedViT


def start_runtime(
    run: Run | None,
    runtime: Runtime,
    model: DialViT,
    images: Tensor,
    degrees: Sequence[int],
    *,
    feature_map: bool = False,
) -> DialViT | OptimizedViT | ExportedViT:
    """Start a model as `Runtime.start` does, with what belongs to its run, if it is of one.

    Exported files are kept in the run's folder, and 8 bits are calibrated on its training images.
    """
    return runtime.start(
        model,
        images,
        degrees=degrees,
        folder=run.runtime_folder if run else None,
        feature_map=feature_map,
        calibration=partial(calibration_images, run) if run else None,
    )
