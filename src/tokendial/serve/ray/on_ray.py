"""The same server on Ray Serve: replicas with a model and an engine each, behind a front.

Ray gives a request up when the replica that has it dies. Predictions may be asked for twice, so the
front keeps every request until it is answered, and asks another replica. Inside a replica the dial
follows the load within milliseconds; the number of replicas follows it within seconds.
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

from tokendial.serve.http.metrics import CONTENT_TYPE, Joined
from tokendial.serve.http.problems import failure, retry_after
from tokendial.serve.http.schemas import Problem
from tokendial.serve.settings import Count, Settings, read_keys

if TYPE_CHECKING:
    from tokendial.serve.workers.facts import Facts

_log = logging.getLogger(__name__)
_TRIES = 2
"""Replicas that may die of a request: it may be the request that kills them."""
_FILLED = 0.7
"""Share of its time that a replica shall be busy with the dial at home; below `Rules.turn_down_at`,
so that the dial does go home once there are enough replicas."""
_HEALTH_S = 2.0
_SCOPE = ("method", "scheme", "http_version", "root_path", "path", "raw_path", "query_string")

Answered = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""


class Deployed(BaseModel):
    """What is deployed: the `args` of an application in Ray Serve's config file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: Annotated[dict[str, Path], Field(min_length=1)]
    """Folders by the names that they are served under; every machine finds them there."""
    settings: Settings = Settings()
    """Of each replica. Where to listen is said in Ray's `http_options` instead."""
    replicas: Count = 1
    """At least so many."""
    max_replicas: Count | None = None
    """As the load asks for, up to so many; None: always `replicas`."""
    home: Annotated[int, Field(ge=0)] = 0
    """Degree to live at: replicas are added until the load can be borne there."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """Of each replica."""


def app(args: Deployed) -> Application:
    """Build the application, for `serve deploy` and `tokendial serve --ray`."""
    settings = args.settings
    if not settings.api_keys:
        settings = settings.model_copy(update={"api_keys": read_keys(None)})
    # What waits has to wait in engines, which know its deadline: Ray is to hold back nothing that
    # an engine would take.
    replicas = serve.deployment(
        max_ongoing_requests=2 * settings.max_queue,
        ray_actor_options={"num_cpus": settings.threads or 1, "num_gpus": args.gpus},
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=_HEALTH_S,
        **_number(args),
    )(Replica)
    front = serve.deployment(
        max_ongoing_requests=settings.max_connections,
        max_queued_requests=settings.max_connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=_HEALTH_S,
    )(Front)
    bound = replicas.bind(args.runs, settings, args.home)
    return front.bind(bound, settings.max_bytes, settings.timeout_s)


def _number(args: Deployed) -> dict[str, Any]:
    if args.max_replicas is None:
        return {"num_replicas": args.replicas}
    policy = AutoscalingPolicy(policy_function=replicas_needed)  # type: ignore[no-untyped-call]
    scaling = AutoscalingConfig(
        min_replicas=args.replicas,
        max_replicas=args.max_replicas,
        policy=policy,
        look_back_period_s=15,
        upscale_delay_s=5,
        downscale_delay_s=120,
    )
    return {"autoscaling_config": scaling}


def replicas_needed(seen: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many as it takes to bear the load with the dial at home."""
    loads = (seen.aggregated_metrics or {}).get("load", {}).values()
    if not loads:  # nothing is known yet
        return seen.target_num_replicas, {}
    most = seen.capacity_adjusted_max_replicas
    return max(1, math.ceil(min(sum(loads) / _FILLED, most))), {}


class Replica:
    """A model, its engine, and the application around it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, runs: Mapping[str, Path], settings: Settings, home: int
    ) -> None:
        # The front needs none of this, and starts in half of the time.
        from tokendial.serve.http.app import create_app
        from tokendial.serve.starting import started
        from tokendial.serve.workers.decoding import DecoderPool

        decoders = DecoderPool(settings)  # they load while the models do
        served, engine, settings = started(runs, settings)
        check_home(home, served.facts, settings)
        self._served, self._engine, self._home = served, engine, home
        self._app = create_app(engine, served, settings, decoders)
        await self._app.router.lifespan_context(self._app).__aenter__()

    async def answer(self, scope: Mapping[str, Any], body: bytes, held_s: float) -> Answered:
        """Answer a request as the application does.

        Args:
            scope: What ASGI tells of it.
            body: All of it.
            held_s: Seconds since it had arrived whole, of which its deadline knows.
        """
        whole: list[Message] = [{"type": "http.request", "body": body}]
        sent: list[Message] = []

        async def receive() -> Message:
            # When the client goes, Ray cancels this call.
            return whole.pop() if whole else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            sent.append(message)

        asked = {"type": "http", "asgi": {"version": "3.0"}, "state": {"held_s": held_s}, **scope}
        try:
            await self._app(asked, receive, send)
        except Exception:
            _log.exception("a request failed")  # the client was told so before
        start, *parts = sent
        return start["status"], start["headers"], b"".join(part["body"] for part in parts)

    async def numbers(self, scope: Mapping[str, Any]) -> tuple[str, Answered]:
        """The answer to `/metrics`, and whose it is."""
        replica = serve.get_replica_context().replica_id.unique_id
        return replica, await self.answer(scope, b"", 0.0)

    async def reload(self) -> list[str]:
        """Read runs anew that have changed; gives their names."""
        return await asyncio.to_thread(self._served.reload, self._engine.call)

    async def reconfigure(self, config: object) -> None:
        """The same: Ray calls it when the `user_config` has changed, whatever that is."""
        _log.info("%s: read anew: %s", config, await self.reload())

    def check_health(self) -> None:
        """Fail when the replica is of no more use, so that Ray replaces it."""
        if not self._engine.useful:
            raise RuntimeError("The engine does not run, or has nothing to run models with.")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `replicas_needed` sees."""
        return {"load": self._engine.utilisation(self._home)}


class Front:
    """Keeps requests until they are answered."""

    def __init__(
        self, replicas: DeploymentHandle[Replica], max_bytes: int, timeout_s: float
    ) -> None:
        self._replicas, self._max_bytes, self._timeout_s = replicas, max_bytes, timeout_s

    async def __call__(self, request: Request) -> Response:
        """Have a request answered."""
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._body(request)
        except TimeoutError:
            return _failed(408, "timeout", "The request did not come in time.")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._answer(request, body)
        except TimeoutError:
            return _failed(503, "unavailable", "No replica has answered in time.")

    async def _body(self, request: Request) -> bytes:
        """All of it; where it is too large, enough for a replica to see that."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                break
        return bytes(body)

    async def _answer(self, request: Request, body: bytes) -> Response:
        scope = {key: request.scope[key] for key in _SCOPE} | {"headers": request.headers.raw}
        if request.scope["path"] == "/metrics":
            return await self._metrics(scope)
        whole = time.monotonic()
        for _ in range(_TRIES):
            held_s = time.monotonic() - whole
            try:
                status, headers, answer = await self._replicas.answer.remote(scope, body, held_s)
            except RayActorError:
                _log.warning("a replica died with a request, another one is asked")
            except (BackPressureError, DeploymentUnavailableError) as error:
                return _failed(503, "unavailable", error.message)
            else:
                return _response(status, headers, answer)
        return _failed(503, "unavailable", f"{_TRIES} replicas died with this request.")

    async def _metrics(self, scope: Mapping[str, Any]) -> Response:
        """The numbers of all replicas: those of one at a time would make no sense together."""
        asked = self._replicas.broadcast("numbers", scope)
        found = dict(
            each
            for each in await asked.results_async(return_exceptions=True)
            if not isinstance(each, Exception)  # it dies
        )
        for status, headers, body in found.values():
            if status != 200:
                return _response(status, headers, body)
        texts = {replica: body.decode() for replica, (_, _, body) in found.items()}
        return Response(Joined(texts).text(), media_type=CONTENT_TYPE)


def check_home(home: int, facts: "Facts", settings: Settings) -> None:
    """Raise a ValueError if the dial does not go to where it is to be at home."""
    offered = facts.ladder(settings.max_degree, settings.min_accuracy)
    if home not in offered:
        raise ValueError(f"home must be one of {', '.join(map(str, offered))}, got {home}.")


def _response(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> Response:
    response = Response(body, status)
    response.raw_headers = headers
    return response


def _failed(status: int, code: str, message: str) -> Response:
    return failure(status, Problem(code=code, message=message, field=None), retry_after(1.0))
