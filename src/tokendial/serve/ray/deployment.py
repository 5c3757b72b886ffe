"""The server on Ray Serve: replicas with a model and an engine each, behind a front.

Ray gives up a request when its replica dies. A prediction can be computed again without harm, so
the front keeps each request until it is answered, and sends it to a second replica. Within a
replica, the dial follows the load in milliseconds. The number of replicas follows in seconds.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from tokendial.serve.http.errors import error_response, retry_after_header
from tokendial.serve.problems import Problem
from tokendial.serve.ray.metrics import CONTENT_TYPE, JoinedMetrics
from tokendial.serve.settings import Count, Settings, read_api_keys

if TYPE_CHECKING:
    from tokendial.serve.workers.catalog import ModelCatalog

_log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 2
"""Number of replicas that get the same request if they die: the request may be the cause."""
_TARGET_UTILISATION = 0.7
"""Target load of a replica with its dial at the home degree. It is below
`ControllerRules.lower_below`, so that the dial returns home once there are enough replicas."""
_HEALTH_CHECK_S = 2.0
_SCOPE_KEYS = ("method", "scheme", "http_version", "root_path", "path", "raw_path", "query_string")

RawResponse = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""


class RayDeployment(BaseModel):
    """What is deployed on Ray: the `args` of the application in Ray Serve's config file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: Annotated[dict[str, Path], Field(min_length=1)]
    """Run folders by the names that they are served under. Every machine must find them at the
    same paths."""
    settings: Settings = Settings()
    """Settings of each replica. Its address is ignored; use Ray's `http_options`."""
    replicas: Count = 1
    """Minimum number of replicas."""
    max_replicas: Count | None = None
    """Maximum number of replicas; null: always `replicas`."""
    home: Annotated[int, Field(ge=0)] = 0
    """Degree the autoscaler sizes for: it adds replicas until this degree suffices."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """Number of GPUs of each replica."""


def app(args: RayDeployment) -> Application:
    """Build the application for `serve deploy` and `tokendial serve --ray`."""
    settings = args.settings
    if not settings.api_keys:
        settings = settings.model_copy(update={"api_keys": read_api_keys(None)})
    # Requests should wait in the engines, which know the deadlines, and not in Ray. So Ray's limit
    # lies above what an engine accepts.
    replicas = serve.deployment(
        max_ongoing_requests=2 * settings.max_queue,
        ray_actor_options={"num_cpus": settings.threads or 1, "num_gpus": args.gpus},
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=_HEALTH_CHECK_S,
        **_scaling_options(args),
    )(Replica)
    front = serve.deployment(
        max_ongoing_requests=settings.max_connections,
        max_queued_requests=settings.max_connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=_HEALTH_CHECK_S,
    )(Front)
    bound = replicas.bind(args.runs, settings, args.home)
    return front.bind(bound, settings.max_bytes, settings.timeout_s)


def _scaling_options(args: RayDeployment) -> dict[str, Any]:
    if args.max_replicas is None:
        return {"num_replicas": args.replicas}
    policy = AutoscalingPolicy(policy_function=needed_replicas)  # type: ignore[no-untyped-call]
    scaling = AutoscalingConfig(
        min_replicas=args.replicas,
        max_replicas=args.max_replicas,
        policy=policy,
        look_back_period_s=15,
        upscale_delay_s=5,
        downscale_delay_s=120,
    )
    return {"autoscaling_config": scaling}


def needed_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Number of replicas that can bear the load with their dials at the home degree."""
    loads = (context.aggregated_metrics or {}).get("load", {}).values()
    if not loads:  # no replica has reported yet
        return context.target_num_replicas, {}
    limit = context.capacity_adjusted_max_replicas
    return max(1, math.ceil(min(sum(loads) / _TARGET_UTILISATION, limit))), {}


class Replica:
    """A model, its engine, and the HTTP application around it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, runs: Mapping[str, Path], settings: Settings, home: int
    ) -> None:
        # Imported here because the front needs none of this and starts in half of the time.
        from tokendial.serve.http.app import create_app
        from tokendial.serve.starting import start_engine
        from tokendial.serve.workers.decoder_pool import DecoderPool

        decoders = DecoderPool(settings)  # it loads its libraries while the models are loaded
        served, engine, settings = start_engine(runs, settings)
        check_home_degree(home, served.supervisor.catalog, settings)
        self._served, self._engine, self._home = served, engine, home
        self._app = create_app(engine, served.supervisor, settings, decoders)
        await self._app.router.lifespan_context(self._app).__aenter__()

    async def answer(self, scope: Mapping[str, Any], body: bytes, held_s: float) -> RawResponse:
        """Answer a request as the HTTP application does.

        Args:
            scope: ASGI scope of the request.
            body: Its whole body.
            held_s: Seconds since the body had arrived; they count towards the deadline.
        """
        incoming: list[Message] = [{"type": "http.request", "body": body}]
        sent: list[Message] = []

        async def receive() -> Message:
            # After the body nothing follows. When the client goes away, Ray cancels this call.
            return incoming.pop() if incoming else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            sent.append(message)

        whole_scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "state": {"held_s": held_s},
            **scope,
        }
        try:
            await self._app(whole_scope, receive, send)
        except Exception:
            _log.exception("a request failed")  # its client has already got a 500
        start, *parts = sent
        return start["status"], start["headers"], b"".join(part["body"] for part in parts)

    async def metrics(self, scope: Mapping[str, Any]) -> tuple[str, RawResponse]:
        """Return the name of this replica and its answer to `/metrics`."""
        replica = serve.get_replica_context().replica_id.unique_id
        return replica, await self.answer(scope, b"", 0.0)

    async def reload(self) -> list[str]:
        """Load runs that have changed on disk, and return their names."""
        return await asyncio.to_thread(self._served.reload, self._engine.call_between_batches)

    async def reconfigure(self, config: object) -> None:
        """Reload the runs. Ray calls this when the `user_config` changes; its value is not used."""
        _log.info("%s: reloaded: %s", config, await self.reload())

    def check_health(self) -> None:
        """Raise an error when the replica no longer works, so that Ray replaces it."""
        if not self._engine.healthy:
            raise RuntimeError("The engine does not run, or has no model process.")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the load for `needed_replicas`."""
        return {"load": self._engine.utilisation(self._home)}


class Front:
    """Keeps each request until a replica has answered it."""

    def __init__(
        self, replicas: DeploymentHandle[Replica], max_bytes: int, timeout_s: float
    ) -> None:
        self._replicas, self._max_bytes, self._timeout_s = replicas, max_bytes, timeout_s

    async def __call__(self, request: Request) -> Response:
        """Receive a request and have it answered."""
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read_body(request)
        except TimeoutError:
            return _failure(408, "timeout", "The request did not come in time.")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._answer(request, body)
        except TimeoutError:
            return _failure(503, "unavailable", "No replica has answered in time.")

    async def _read_body(self, request: Request) -> bytes:
        """Read the body; of one that is too large, as much as shows that to a replica."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                break
        return bytes(body)

    async def _answer(self, request: Request, body: bytes) -> Response:
        scope = {key: request.scope[key] for key in _SCOPE_KEYS} | {"headers": request.headers.raw}
        if request.scope["path"] == "/metrics":
            return await self._metrics(scope)
        received = time.monotonic()
        for _ in range(_MAX_ATTEMPTS):
            held_s = time.monotonic() - received
            try:
                status, headers, answer = await self._replicas.answer.remote(scope, body, held_s)
            except RayActorError:
                _log.warning("a replica died with a request; another replica gets the request")
            except (BackPressureError, DeploymentUnavailableError) as error:
                return _failure(503, "unavailable", error.message)
            else:
                return _response(status, headers, answer)
        return _failure(503, "unavailable", f"{_MAX_ATTEMPTS} replicas died with this request.")

    async def _metrics(self, scope: Mapping[str, Any]) -> Response:
        """Join the metrics of all replicas."""
        calls = self._replicas.broadcast("metrics", scope)
        responses = dict(
            each
            for each in await calls.results_async(return_exceptions=True)
            if not isinstance(each, Exception)  # a replica that is dying
        )
        for status, headers, body in responses.values():
            if status != 200:
                return _response(status, headers, body)
        texts = {replica: body.decode() for replica, (_, _, body) in responses.items()}
        return Response(JoinedMetrics(texts).text(), media_type=CONTENT_TYPE)


def check_home_degree(home: int, catalog: "ModelCatalog", settings: Settings) -> None:
    """Raise a ValueError if the server does not offer the home degree."""
    offered = catalog.allowed_degrees(settings.max_degree, settings.min_accuracy)
    if home not in offered:
        raise ValueError(f"home must be one of {', '.join(map(str, offered))}, got {home}.")


def _response(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> Response:
    response = Response(body, status)
    response.raw_headers = headers
    return response


def _failure(status: int, code: str, message: str) -> Response:
    problem = Problem(code=code, message=message, field=None)
    return error_response(status, problem, retry_after_header(1.0))
