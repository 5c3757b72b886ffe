"""`tokendial serve --ray`: serve on a Ray cluster until a signal ends it."""

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
from tokendial.serve.http.server import UNPROTECTED_WARNING, bind_socket, is_unprotected
from tokendial.serve.ray.deployment import RayDeployment, Replica, app, check_home_degree
from tokendial.serve.workers.models import load_models

_NAME = "tokendial"
"""Name of the application in the cluster."""


def serve_on_ray(deployment: RayDeployment, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT. At SIGHUP, all replicas load changed runs.

    The cluster is the one that RAY_ADDRESS names. Without that variable, a cluster is started on
    this machine, and it ends with the server.

    Args:
        deployment: What to deploy. Every machine of the cluster must find its folders.
        ready: Called when the server accepts requests.

    Raises:
        ValueError: If a run cannot be served, a setting does not fit it, or the machine has too
            few CPUs or GPUs.
    """
    settings, joins = deployment.settings, "RAY_ADDRESS" in os.environ
    # Mistakes are found here, before any replica starts, so that they are errors of one line.
    most = deployment.max_replicas
    if most is not None and most < deployment.replicas:
        raise ValueError(f"max_replicas must be at least {deployment.replicas}, got {most}.")
    if settings.port == 0:
        raise ValueError("port: a cluster needs one that every machine knows, got 0.")
    runs = {name: Run(folder) for name, folder in deployment.runs.items()}
    bridge = Path(settings.compensator) if settings.compensator else None
    check_home_degree(deployment.home, load_models(runs, compensator=bridge).catalog, settings)
    if not joins:
        with bind_socket(settings) as listener:  # fails if the address is taken
            if is_unprotected(listener, settings):
                print(UNPROTECTED_WARNING.format(settings.host), file=sys.stderr)
    # By default, Ray sends statistics about its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On a busy machine, the process that takes the requests needs more than Ray's 5 s to start.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Anyone who reaches Ray's dashboard can run programs; a cluster of one's own needs none.
    dashboard = None if joins else False
    ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if resources.get("GPU", 0):
            deployment = deployment.model_copy(update={"gpus": 1})
        if not joins:
            _check_resources(deployment, resources)
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(app(deployment), name=_NAME, logging_config={"enable_access_log": False})
        # Until here, Ray's own signal handlers end the process while it starts.
        signals: SimpleQueue[int] = SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.put(number))
        ready()
        while signals.get() == signal.SIGHUP:
            _reload()
        serve.delete(_NAME)
    finally:
        if not joins:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _reload() -> None:
    handle = serve.get_deployment_handle(Replica.__name__, _NAME)
    for changed in handle.broadcast("reload").results(return_exceptions=True):
        if isinstance(changed, Exception):
            print(
                "the runs could not be reloaded, the old models stay in use: "
                f"{error_message(changed)}",
                file=sys.stderr,
            )
        else:
            print(f"reloaded: {', '.join(changed) or 'nothing has changed'}", flush=True)


def _check_resources(deployment: RayDeployment, resources: Mapping[str, float]) -> None:
    """Raise a ValueError if the replicas do not fit; Ray would wait for more machines for ever."""
    most = deployment.max_replicas or deployment.replicas
    for kind, each in (("CPU", deployment.settings.threads or 1), ("GPU", deployment.gpus)):
        if most * each > resources.get(kind, 0):
            raise ValueError(
                f"replicas: {most} of them need {most * each:g} {kind}s, this machine has "
                f"{resources.get(kind, 0):g}."
            )
