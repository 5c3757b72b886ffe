"""The HTTP application around an engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tokendial
from tokendial.serve import page_routes, routes
from tokendial.serve.access import KeyHolders
from tokendial.serve.engine import Engine
from tokendial.serve.metrics import Metrics
from tokendial.serve.predicting import Predictor
from tokendial.serve.problems import install
from tokendial.serve.served import Served
from tokendial.serve.settings import Settings


def create_app(engine: Engine, served: Served, settings: Settings) -> FastAPI:
    """Make the application; whoever made the engine starts and drains it."""
    metrics = Metrics(engine, served, settings.slo_ms)
    predictor = Predictor(engine, served, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ticking = asyncio.create_task(_every_second(metrics))
        yield
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking

    app = FastAPI(
        title="Tokendial",
        version=tokendial.__version__,
        description="A Vision Transformer whose cost follows the load.",
        # The pages that FastAPI offers load their scripts from other machines.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    install(app)
    app.add_middleware(_Counted, metrics=metrics)
    keys = Depends(KeyHolders(settings.api_keys))
    app.include_router(routes.predictions(predictor), prefix="/v1", dependencies=[keys])
    about = routes.about(engine, served, predictor, metrics)
    app.include_router(about, prefix="/v1", dependencies=[keys])
    views = page_routes.tokens(engine, served, predictor)
    app.include_router(views, prefix="/v1", dependencies=[keys])
    app.include_router(page_routes.page())
    app.include_router(routes.numbers(metrics), dependencies=[keys])
    app.include_router(routes.machines(engine))
    return app


async def _every_second(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(1)
        metrics.last_minute.tick()


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
