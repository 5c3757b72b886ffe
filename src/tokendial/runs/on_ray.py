"""Answers for many images from many GPUs or machines, by Ray Data."""

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Answering = Callable[[Sequence[Any]], Sequence[Any]]
"""Takes a batch of sources, and returns one answer for each."""


def check_ray() -> None:
    """Raise a ValueError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError("ray: prediction on Ray needs: pip install 'tokendial[ray]'.")


def answers_on_ray(
    build: Callable[..., Answering],
    settings: Mapping[str, Any],
    sources: Iterable[Any],
    batch_size: int,
) -> Iterator[Any]:
    """Answer sources with one worker per GPU of a Ray cluster, or per CPU without GPUs.

    The cluster is the one that RAY_ADDRESS names. Without it, a cluster is started on this machine,
    and shut down after the last answer.

    Args:
        build: Makes what answers batches, once in each worker; a class or function of a module.
        settings: Its arguments by name. Paths must be the same on every machine.
        sources: What to answer; it is pickled.
        batch_size: Sources per batch.

    Yields:
        The answers, in the order of the sources.
    """
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
            fn_constructor_args=(build, dict(settings)),
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
    """Answers with one copy of the model, on one GPU or CPU."""

    def __init__(self, build: Callable[..., Answering], settings: dict[str, Any]) -> None:
        self.answer = build(**settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Answer one batch of pickled sources."""
        sources = [pickle.loads(source) for source in batch["source"]]
        return {"answer": [pickle.dumps(answer) for answer in self.answer(sources)]}
