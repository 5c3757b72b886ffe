"""Prediction of classes on many GPUs or machines, by Ray Data."""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from tokendial.runs.predict import Answer, ClassPredictor, Source
from tokendial.runs.run import Run


def predict_on_ray(
    run: Run,
    sources: Iterable[Source],
    *,
    degree: int | None = None,
    top: int = 1,
    batch_size: int = 32,
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

    Raises:
        ValueError: If Ray is missing, the run has no model or predicts masks, or `degree` or `top`
            is out of range.
    """
    if find_spec("ray") is None:
        raise ValueError("ray: prediction on Ray needs: pip install 'tokendial[ray]'.")
    settings: dict[str, Any] = {"degree": degree, "top": top, "batch_size": batch_size}
    # Loading the model here raises errors in one line, before any worker starts.
    batch_size = ClassPredictor(run, **settings, device="cpu").batch_size
    # Ray sends usage statistics to its makers unless this is 0.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        rows = [{"source": pickle.dumps(source)} for source in sources]
        answers = ray.data.from_items(rows).map_batches(
            _Worker,
            fn_constructor_args=(str(run.folder.resolve()), settings),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or cpus),
            num_gpus=1 if gpus else 0,
        )
        for row in answers.iter_rows():
            # Unpickling is safe: our own workers have pickled it.
            yield pickle.loads(row["answer"])
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """Predicts with one copy of the model, on one GPU or CPU."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.predictor = ClassPredictor(Run(folder), **settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Predict one batch of pickled sources."""
        sources = [pickle.loads(source) for source in batch["source"]]
        return {"answer": [pickle.dumps(answer) for answer in self.predictor(sources)]}
