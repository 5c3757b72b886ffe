"""Prediction of classes on many GPUs or machines, by Ray Data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokendial.runs.model_source import absolute
from tokendial.runs.on_ray import answers_on_ray, check_ray
from tokendial.runs.predict import Answer, ClassPredictor, Source
from tokendial.runs.run import Run


def predict_on_ray(
    run: Run,
    sources: Iterable[Source],
    *,
    degree: int | None = None,
    top: int = 1,
    batch_size: int = 32,
    compensator: str | Path | None = None,
) -> Iterator[Answer]:
    """Predict as `predict` does, with one worker per GPU of a Ray cluster, or per CPU without GPUs.

    The cluster is the one that RAY_ADDRESS names. Without it, a cluster is started on this machine,
    and shut down after the last answer. Every machine must find the run folder and the sources
    under the same paths.

    Args:
        run: A run with a model.
        sources: Image files and images in shards, or video files for a run on videos.
        degree: Degree of the dial. None means the degree that the model was trained at.
        top: Number of most probable classes in each prediction.
        batch_size: Images, or views of videos, per forward pass.
        compensator: Folder of a compensator, which adapts the model to the degree. None: without.

    Raises:
        ValueError: If Ray is missing, the run has no model or predicts no classes, the compensator
            does not fit it, or `degree` or `top` is out of range.
    """
    check_ray()
    settings: dict[str, Any] = {"degree": degree, "top": top, "batch_size": batch_size}
    if compensator:
        settings["compensator"] = absolute(str(compensator))
    # Loading the model here raises errors in one line, before any worker starts.
    batch_size = ClassPredictor(run, **settings, device="cpu").batch_size
    settings["run"] = Run(run.folder.resolve())
    yield from answers_on_ray(ClassPredictor, settings, sources, batch_size)
