"""`tokendial serve --ray`: a cluster that serves until it is told to end."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue

import ray
from ray import serve

from tokendial.errors import error_message
from tokendial.runs.run import Run
from tokendial.serve.http.server import bound_socket, exposed
from tokendial.serve.ray.on_ray import Deployed, Replica, app, check_home
from tokendial.serve.workers.models import load_models

_NAME = "tokendial"
"""Of the application, in the cluster."""


def serve_on_ray(deployed: Deployed, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; at SIGHUP, replicas read runs anew.

    On the cluster that RAY_ADDRESS names; without it, on one that is started on this machine and
    ends with the server.

    Args:
        deployed: Folders have to lie where every machine of the cluster finds them.
        ready: Called when requests can come.

    Raises:
        ValueError: If a run cannot be served, a setting does not fit it, or the machine is too
            small.
    """
    settings, joins = deployed.settings, "RAY_ADDRESS" in os.environ
    # Mistakes are told here, in one line, before any replica starts.
    most = deployed.max_replicas
    if most is not None and most < deployed.replicas:
        raise ValueError(f"max_replicas must be at least {deployed.replicas}, got {most}.")
    if settings.port == 0:
        raise ValueError("port: a cluster needs one that every machine knows, got 0.")
    runs = {name: Run(folder) for name, folder in deployed.runs.items()}
    bridge = Path(settings.compensator) if settings.compensator else None
    check_home(deployed.home, load_models(runs, compensator=bridge).facts, settings)
    if not joins:
        with bound_socket(settings) as listener:  # it is free
            if exposed(listener, settings):
                told = f"whoever reaches {settings.host} may ask: there are no API keys."
                print(told, file=sys.stderr)
    # Ray tells its makers what it is used for, unless it is asked not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Ray's dashboard lets whoever reaches it run programs; a cluster of one's own needs none.
    dashboard = None if joins else False
    ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    try:
        have = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if have.get("GPU", 0):
            deployed = deployed.model_copy(update={"gpus": 1})
        if not joins:
            _check_room(deployed, have)
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(app(deployed), name=_NAME, logging_config={"enable_access_log": False})
        # Before, Ray's own handlers end the process, and with it what has begun.
        asked: SimpleQueue[int] = SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: asked.put(number))
        ready()
        while asked.get() == signal.SIGHUP:
            _reload()
        serve.delete(_NAME)
    finally:
        if not joins:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _reload() -> None:
    handle = serve.get_deployment_handle(Replica.__name__, _NAME)
    for found in handle.broadcast("reload").results(return_exceptions=True):
        if isinstance(found, Exception):
            print(f"not reloaded, the old models go on: {error_message(found)}", file=sys.stderr)
        else:
            print(f"read anew: {', '.join(found) or 'nothing has changed'}", flush=True)


def _check_room(deployed: Deployed, have: Mapping[str, float]) -> None:
    """Ray would wait for machines to come."""
    most = deployed.max_replicas or deployed.replicas
    for kind, each in (("CPU", deployed.settings.threads or 1), ("GPU", deployed.gpus)):
        if most * each > have.get(kind, 0):
            raise ValueError(
                f"replicas: {most} of them need {most * each:g} {kind}s, this machine has "
                f"{have.get(kind, 0):g}."
            )
