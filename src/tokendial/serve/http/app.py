"""The HTTP application around an engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache

from fastapi import Depends, FastAPI

import tokendial
from tokendial.serve.http.admission import ApiKeyCheck, RequestMiddleware
from tokendial.serve.http.api_page import api_page
from tokendial.serve.http.errors import install_error_handlers
from tokendial.serve.http.metrics import Metrics
from tokendial.serve.http.page_routes import page_routes, token_routes
from tokendial.serve.http.prediction import PredictionHandler, prediction_routes
from tokendial.serve.http.routes import health_routes, information_routes, metrics_routes
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.settings import Settings
from tokendial.serve.workers.decoder_pool import DecoderPool
from tokendial.serve.workers.supervisor import Supervisor


def create_app(
    engine: Engine, supervisor: Supervisor, settings: Settings, decoders: DecoderPool
) -> FastAPI:
    """Create the application. The caller starts and ends the engine and the processes."""
    metrics = Metrics(engine, supervisor, settings.slo_ms)
    handler = PredictionHandler(engine, supervisor, settings, metrics, decoders)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        minute = metrics.last_minute
        tasks = [
            asyncio.create_task(each)
            for each in (minute.end_every_second(), minute.measure_loop_lag())
        ]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app = FastAPI(
        title="Tokendial",
        version=tokendial.__version__,
        description="A Vision Transformer whose cost follows the load.",
        # FastAPI's own documentation pages load scripts from other machines.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirection would not be an error in JSON
        lifespan=lifespan,
    )
    install_error_handlers(app)
    app.add_middleware(RequestMiddleware, settings=settings, metrics=metrics)
    key_check = [Depends(ApiKeyCheck(settings.api_keys))]
    for routes in (
        prediction_routes(handler, settings),
        information_routes(engine, supervisor, handler, metrics),
        token_routes(engine, supervisor, handler),
    ):
        app.include_router(routes, prefix="/v1", dependencies=key_check)
    app.include_router(page_routes(cache(lambda: api_page(app.openapi()))))
    app.include_router(metrics_routes(metrics), dependencies=key_check)
    app.include_router(health_routes(engine))
    return app
