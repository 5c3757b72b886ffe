"""Batch prediction on many GPUs or machines through Ray Data, in the order of the sources."""

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
    """The answers of `predict`, computed by as many workers as there are GPUs (without any: CPUs).

    On the cluster that RAY_ADDRESS names; without it, on one that is started on this machine and
    ends with the last answer. Run folder and sources have to lie where every machine finds them.

    Args:
        run: A run with a model.
        sources: Image files and images in shards, or video files for a run on videos.
        degree: Degree of the dial; None: the one that the model was trained at.
        top: How many classes to give for each.
        batch_size: Images, or views of videos, per forward pass.

    Raises:
        ValueError: If Ray is missing, the run has no model or learns masks, or `degree` or `top` is
            not there.
    """
    if find_spec("ray") is None:
        raise ValueError("ray: prediction on Ray needs: pip install 'tokendial[ray]'.")
    settings: dict[str, Any] = {"degree": degree, "top": top, "batch_size": batch_size}
    # Mistakes are told here, in one line, before any worker starts.
    batch = ClassPredictor(run, **settings, device="cpu").batch_size
    # Ray tells its makers what it is used for, unless it is asked not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        have = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 1))
        rows = [{"source": pickle.dumps(source)} for source in sources]
        answers = ray.data.from_items(rows).map_batches(
            _Worker,
            fn_constructor_args=(str(run.folder.resolve()), settings),
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or cpus),
            num_gpus=1 if gpus else 0,
        )
        for row in answers.iter_rows():
            # Made by our own workers a moment ago.
            yield pickle.loads(row["answer"])
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """One model, on one GPU or CPU."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.predictor = ClassPredictor(Run(folder), **settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Predict a batch."""
        sources = [pickle.loads(source) for source in batch["source"]]
        return {"answer": [pickle.dumps(answer) for answer in self.predictor(sources)]}
