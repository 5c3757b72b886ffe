"""From run folders and settings to models in memory and an engine that runs."""

from collections.abc import Mapping
from pathlib import Path

import torch

from tokendial.serve.controller import Rules
from tokendial.serve.engine import Engine
from tokendial.serve.scheduler import Scheduler
from tokendial.serve.served import Served
from tokendial.serve.settings import Settings
from tokendial.train.runs import Run


def started(runs: Mapping[str, Path], settings: Settings) -> tuple[Served, Engine]:
    """Load runs, measure what every degree costs on this machine, start the engine.

    PyTorch computes with one thread in this process from then on. Whoever calls closes what is
    served after the engine has ended.

    Args:
        runs: Folders by the names that they are served under; the first one is the default.
        settings: The objective and the dial.

    Raises:
        ValueError: If a run cannot be served, or a setting does not fit it.
    """
    # Models have their own process; here, images are prepared in many threads, each by itself.
    torch.set_num_threads(1)
    served = Served({name: Run(folder) for name, folder in runs.items()}, settings)
    try:
        return served, _engine(served, settings)
    except BaseException:
        served.close()
        raise


def _engine(served: Served, settings: Settings) -> Engine:
    offered = served.facts.ladder(settings.max_degree, settings.min_accuracy)
    fixed = settings.degree
    if fixed is not None and fixed not in offered:
        raise ValueError(f"degree must be one of {', '.join(map(str, offered))}, got {fixed}.")
    rules = Rules(
        slo_s=settings.engine_slo_s,
        degrees=offered if fixed is None else (fixed,),
        max_batch=settings.max_batch,
    )
    costs = served.measured(rules, offered)
    wait_s = settings.max_wait_ms / 1000
    scheduler = Scheduler(costs, rules, max_queue=settings.max_queue, max_wait_s=wait_s)
    engine = Engine(served.run, scheduler)
    engine.start()
    return engine
