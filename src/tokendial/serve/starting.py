"""Start-up: from run folders and settings to loaded models and a running engine."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.cascade import CascadeStages
from tokendial.runs.run import Run
from tokendial.serve.scheduling.controller import ControllerRules
from tokendial.serve.scheduling.cost_model import CostModel, measure_costs
from tokendial.serve.scheduling.engine import Engine, WorkerLostError
from tokendial.serve.scheduling.scheduler import Scheduler
from tokendial.serve.scheduling.second_answers import SecondAnswers
from tokendial.serve.settings import Settings
from tokendial.serve.workers.messages import ImageToEmbed
from tokendial.serve.workers.served_runs import ServedRuns
from tokendial.serve.workers.supervisor import Supervisor

_log = logging.getLogger(__name__)
_OBJECTIVE_FACTOR = 3.0
"""Shortest sensible objective as a multiple of the time of one image: a request waits for the
batch before it, then for its own, and the rest is for HTTP and decoding."""


def start_engine(
    runs: Mapping[str, Path], settings: Settings
) -> tuple[ServedRuns, Engine, Settings]:
    """Load runs, measure each degree's time on this machine, and start the engine.

    From then on, PyTorch uses one thread in this process. The caller closes the served runs after
    the engine has ended.

    Args:
        runs: Run folders by the names that they are served under. The first one is the default.
        settings: Settings of the server.

    Returns:
        The served runs, the engine, and the settings with an objective. If none was set, it is
        the default or `_OBJECTIVE_FACTOR` times the time of one image at the lowest degree,
        whichever is longer.

    Raises:
        ValueError: If a run cannot be served, or a setting does not fit it.
    """
    # Models run in processes of their own. In this one, several threads handle tensors, and each
    # is to stay on one core.
    torch.set_num_threads(1)
    served = ServedRuns({name: Run(folder) for name, folder in runs.items()}, settings)
    try:
        offered = _offered_degrees(served.supervisor, settings)
        settings = choose_objective(served.supervisor, settings, offered)
        engine = _start_engine(served.supervisor, settings, offered)
        # Not earlier: its start would slow down the batches whose times the engine goes by.
        served.keep_spare()
        return served, engine, settings
    except BaseException:
        served.close()
        raise


def choose_objective(
    supervisor: Supervisor, settings: Settings, degrees: Sequence[int]
) -> Settings:
    """Return settings whose objective is the given one, or one that this machine can keep."""
    degree = degrees[0] if settings.degree is None else settings.degree
    image_ms = 1000 * max(_one_image_s(supervisor, n, degree) for n in supervisor.catalog.names)
    shortest_ms = float(math.ceil(_OBJECTIVE_FACTOR * image_ms))
    if shortest_ms <= settings.slo_ms:
        return settings
    if "slo_ms" not in settings.model_fields_set:
        return settings.model_copy(update={"slo_ms": shortest_ms})
    _log.warning(
        "slo_ms: %g ms is short: one image takes %.1f ms at degree %d here, so %g ms or more is "
        "advised.",
        *(settings.slo_ms, image_ms, degree, shortest_ms),
    )
    return settings


def measure_batch_times(
    supervisor: Supervisor, rules: ControllerRules, degrees: Sequence[int]
) -> CostModel:
    """Time batches of all models at the given degrees, as large as the objective allows."""

    def run(name: str, degree: int, images: int) -> float:
        return _batch_seconds(supervisor, name, degree, images)

    names, within_s = supervisor.catalog.names, rules.slo_s / 2
    return measure_costs(run, names, degrees, max_batch=rules.max_batch, within_s=within_s)


def _offered_degrees(supervisor: Supervisor, settings: Settings) -> tuple[int, ...]:
    offered = supervisor.catalog.allowed_degrees(settings.max_degree, settings.min_accuracy)
    listed = ", ".join(map(str, offered))
    if settings.degree is not None and settings.degree not in offered:
        raise ValueError(f"degree must be one of {listed}, got {settings.degree}.")
    if settings.cascade:
        for degree in _stages(supervisor).degrees:
            if degree not in offered:
                raise ValueError(f"cascade: degree {degree} is not offered; it must be {listed}.")
    return offered


def _stages(supervisor: Supervisor) -> CascadeStages:
    """The cascade of the only model, as it is now: a reload may change thresholds."""
    (model,) = supervisor.catalog.models.values()
    assert model.cascade is not None
    return model.cascade


def _dial_degrees(
    supervisor: Supervisor, settings: Settings, offered: Sequence[int]
) -> tuple[int, ...]:
    """Degrees that the dial may take. Of those that a cascade spans it takes the ends only."""
    if settings.degree is not None:
        return (settings.degree,)
    if not settings.cascade:
        return tuple(offered)
    cheap, *_, last = _stages(supervisor).degrees
    return tuple(degree for degree in offered if degree <= last or degree >= cheap)


def _how_sure(
    supervisor: Supervisor, images: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[float]:
    """How sure the model is of each output. Of an embedding, infinitely: it has one answer."""
    sure = [math.inf] * len(images)
    classified = [i for i, image in enumerate(images) if not isinstance(image, ImageToEmbed)]
    if classified:
        logits = torch.stack([outputs[i] for i in classified])
        found = _stages(supervisor).how_sure(logits).tolist()
        for place, value in zip(classified, found, strict=True):
            sure[place] = value
    return sure


def _one_image_s(supervisor: Supervisor, name: str, degree: int) -> float:
    """Seconds of one image: the second fastest of four runs, as the first one warms up."""
    return sorted(_batch_seconds(supervisor, name, degree, 1) for _ in range(4))[1]


def _batch_seconds(supervisor: Supervisor, name: str, degree: int, images: int) -> float:
    """Seconds of a batch of random images; a ValueError if the process is lost with it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(supervisor.catalog.input_shape, generator=generator)
    began = time.perf_counter()
    try:
        supervisor.run(name, degree, [image] * images)
    except WorkerLostError as error:
        raise ValueError(
            f"{name}: {images} images at degree {degree} cannot be run: {error} If memory is "
            "short, reduce max_batch."
        ) from None
    return time.perf_counter() - began


def _start_engine(supervisor: Supervisor, settings: Settings, offered: Sequence[int]) -> Engine:
    rules = ControllerRules(
        slo_s=settings.engine_slo_s,
        degrees=_dial_degrees(supervisor, settings, offered),
        max_batch=settings.max_batch,
    )
    costs = measure_batch_times(supervisor, rules, offered)
    second_answers = SecondAnswers(partial(_stages, supervisor)) if settings.cascade else None
    scheduler = Scheduler(
        costs,
        rules,
        max_queue=settings.max_queue,
        max_wait_s=settings.max_wait_ms / 1000,
        second_answers=second_answers,
    )
    engine = Engine(
        supervisor.run,
        scheduler,
        how_sure=partial(_how_sure, supervisor) if settings.cascade else None,
        missing_s=lambda: supervisor.missing_s,
    )
    engine.start()
    return engine
