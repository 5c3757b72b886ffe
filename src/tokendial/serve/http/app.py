"""The HTTP application around an engine."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tokendial
from tokendial.serve.http import page_routes, routes
from tokendial.serve.http.access import KeyHolders
from tokendial.serve.http.api_page import api_page
from tokendial.serve.http.memory import MemoryLimit
from tokendial.serve.http.metrics import Metrics
from tokendial.serve.http.predicting import Predictor
from tokendial.serve.http.problems import install
from tokendial.serve.http.request_checks import RequestChecks
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.settings import Settings
from tokendial.serve.workers.decoding import DecoderPool
from tokendial.serve.workers.served import Served

_LOOK_S = 0.01
"""How often the event loop is to come round."""


def create_app(
    engine: Engine, served: Served, settings: Settings, decoders: DecoderPool
) -> FastAPI:
    """Make the application; whoever made the engine and the decoders starts and ends them."""
    metrics = Metrics(engine, served, settings.slo_ms)
    predictor = Predictor(engine, served, settings, metrics, decoders)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = [asyncio.create_task(each(metrics)) for each in (_every_second, _watch_loop)]
        yield
        for task in watching:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app = FastAPI(
        title="Tokendial",
        version=tokendial.__version__,
        description="A Vision Transformer whose cost follows the load.",
        # The pages that FastAPI offers load their scripts from other machines.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirection is no answer in JSON
        lifespan=lifespan,
    )
    install(app)
    app.add_middleware(MemoryLimit, most=settings.max_memory)
    app.add_middleware(RequestChecks, settings=settings)
    app.add_middleware(_Counted, metrics=metrics)
    keys = Depends(KeyHolders(settings.api_keys))
    app.include_router(routes.predictions(predictor), prefix="/v1", dependencies=[keys])
    about = routes.about(engine, served, predictor, metrics)
    app.include_router(about, prefix="/v1", dependencies=[keys])
    views = page_routes.tokens(engine, served, predictor)
    app.include_router(views, prefix="/v1", dependencies=[keys])
    app.include_router(page_routes.page(cache(lambda: api_page(app.openapi()))))
    app.include_router(routes.numbers(metrics), dependencies=[keys])
    app.include_router(routes.machines(engine))
    return app


async def _every_second(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(1)
        metrics.last_minute.tick()


async def _watch_loop(metrics: Metrics) -> None:
    """Measure how late the event loop is: for so long, it could answer nobody."""
    while True:
        due = time.monotonic() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        metrics.last_minute.looped(time.monotonic() - due)


class _Counted:
    """Counts answers by their status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(message["status"])
            await send(message)

        await self._app(scope, receive, counted)
