"""From run folders and settings to models in memory and an engine that runs."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokendial.runs.run import Run
from tokendial.serve.scheduling.controller import Rules
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.scheduler import Scheduler
from tokendial.serve.settings import Settings
from tokendial.serve.workers.served import Served

_log = logging.getLogger(__name__)
_OBJECTIVE = 3.0
"""Times what one image takes: that of who came before, one's own, and the rest."""
_SLOWER = 10.0
"""Times what a batch should take at most, after which its process is taken for stuck."""
_SHORTEST_LIMIT_S = 2.0


def started(runs: Mapping[str, Path], settings: Settings) -> tuple[Served, Engine, Settings]:
    """Load runs, measure what every degree costs on this machine, start the engine.

    PyTorch computes with one thread in this process from then on. Whoever calls closes what is
    served after the engine has ended.

    Args:
        runs: Folders by the names that they are served under; the first one is the default.
        settings: The objective and the dial.

    Returns:
        What is served, the engine, and the settings with an objective: where none was set, the
        default or `_OBJECTIVE` times what one image takes at the lowest degree, whichever is
        longer.

    Raises:
        ValueError: If a run cannot be served, or a setting does not fit it.
    """
    # Models have their own process; here, images are prepared in many threads, each by itself.
    torch.set_num_threads(1)
    served = Served({name: Run(folder) for name, folder in runs.items()}, settings)
    try:
        offered = _offered(served, settings)
        settings = with_objective(served, settings, offered)
        return served, _engine(served, settings, offered), settings
    except BaseException:
        served.close()
        raise


def _offered(served: Served, settings: Settings) -> tuple[int, ...]:
    offered = served.facts.ladder(settings.max_degree, settings.min_accuracy)
    if settings.degree is not None and settings.degree not in offered:
        told = ", ".join(map(str, offered))
        raise ValueError(f"degree must be one of {told}, got {settings.degree}.")
    return offered


def with_objective(served: Served, settings: Settings, offered: Sequence[int]) -> Settings:
    """Settings with an objective that this machine can keep, or was told to keep."""
    degree = offered[0] if settings.degree is None else settings.degree
    image_ms = 1000 * max(_one_image(served, name, degree) for name in served.facts.names)
    least_ms = float(math.ceil(_OBJECTIVE * image_ms))
    if least_ms <= settings.slo_ms:
        return settings
    if "slo_ms" not in settings.model_fields_set:
        return settings.model_copy(update={"slo_ms": least_ms})
    _log.warning(
        "slo_ms: %g ms are short: one image takes %.1f ms at degree %d here, so %g ms or more are "
        "advised.",
        *(settings.slo_ms, image_ms, degree, least_ms),
    )
    return settings


def _one_image(served: Served, name: str, degree: int) -> float:
    """Seconds that it takes: the median of some, after one that warms up."""
    return sorted(served.seconds(name, degree, 1) for _ in range(4))[1]


def _engine(served: Served, settings: Settings, offered: Sequence[int]) -> Engine:
    rules = Rules(
        slo_s=settings.engine_slo_s,
        degrees=tuple(offered) if settings.degree is None else (settings.degree,),
        max_batch=settings.max_batch,
    )
    costs = served.measured(rules, offered)
    wait_s = settings.max_wait_ms / 1000
    scheduler = Scheduler(costs, rules, max_queue=settings.max_queue, max_wait_s=wait_s)

    def run(name: str, degree: int, images: Sequence[Tensor]) -> list[Tensor]:
        limit_s = _SLOWER * costs.cautious(name, degree, len(images))
        return served.run(name, degree, images, max(limit_s, _SHORTEST_LIMIT_S))

    engine = Engine(run, scheduler, missing_s=lambda: served.missing_s)
    engine.start()
    return engine
