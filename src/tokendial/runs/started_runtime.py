"""Models of runs in the runtime that computes them."""

import json
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from tokendial.errors import error_message
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.runs.training_images import calibration_images
from tokendial.runtimes import PLAIN, Runtime
from tokendial.runtimes.exported_vit import ExportedViT
from tokendial.tune import OptimizedViT


def own_runtime(run: Run) -> Runtime:
    """The runtime and precision that `tokendial tune` chose for a run; of other runs the plain one.

    Raises:
        ValueError: If tuned.json is damaged.
    """
    if not run.tuned_file.is_file():
        return PLAIN
    try:
        record = json.loads(run.tuned_file.read_text(encoding="utf-8"))
        return Runtime(record["runtime"], record["precision"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.tuned_file} is damaged: {error_message(error)}") from None


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
