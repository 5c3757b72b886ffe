"""Routes that describe the server: its models, its degrees, its load, its health, its metrics."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from tokendial.serve.http.metrics import CONTENT_TYPE, Metrics
from tokendial.serve.http.openapi import error_responses
from tokendial.serve.http.prediction import PredictionHandler
from tokendial.serve.http.schemas import Degree, Degrees, Live, Model, ModelChoice, Models
from tokendial.serve.problems import ProblemError
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.workers.supervisor import Supervisor


def information_routes(
    engine: Engine, supervisor: Supervisor, handler: PredictionHandler, metrics: Metrics
) -> APIRouter:
    """Routes `/models`, `/degrees` and `/live`."""
    router = APIRouter(tags=["about"], responses=error_responses(401))

    @router.get("/models")
    async def models() -> Models:
        """List the served models."""
        catalog = supervisor.catalog
        return Models(
            models=[
                Model(
                    name=name,
                    kind=catalog.kind(name),
                    classes=list(model.classes),
                    revision=model.revision,
                    default=name == catalog.names[0],
                )
                for name, model in catalog.models.items()
            ]
        )

    @router.get("/degrees", responses=error_responses(404, 422))
    async def degrees(choice: Annotated[ModelChoice, Query()]) -> Degrees:
        """List the degrees of the dial: their cost, time on this machine, and accuracy."""
        name, catalog = handler.model_name(choice), supervisor.catalog
        return Degrees(
            model=name,
            degree=engine.status().degree,
            degrees=[
                Degree(
                    degree=degree,
                    gmacs=catalog.models[name].gmacs[degree],
                    ms=1000 * engine.seconds(name, degree),
                    accuracy=catalog.accuracy(name, degree),
                )
                for degree in handler.degrees
            ],
        )

    @router.get("/live")
    async def live() -> Live:
        """Return load, degree and latency, now and in the last minute."""
        return metrics.live()

    return router


def health_routes(engine: Engine) -> APIRouter:
    """Routes `/healthz` and `/readyz`."""
    router = APIRouter(tags=["machines"])

    @router.get("/healthz", responses=error_responses(503))
    async def healthz() -> dict[str, str]:
        """Tell whether this server works; if not, it should be restarted."""
        if not engine.healthy:
            raise ProblemError(503, "stopped", "The engine does not run, or has no model process.")
        return {"status": "ok"}

    @router.get("/readyz", responses=error_responses(503))
    async def readyz() -> dict[str, str]:
        """Tell whether requests should be sent to this server."""
        if not engine.ready:
            message = "The server is starting or stopping, or its model process is being replaced."
            raise ProblemError(503, "not_ready", message)
        return {"status": "ready"}

    return router


def metrics_routes(metrics: Metrics) -> APIRouter:
    """Route `/metrics`."""
    router = APIRouter(tags=["machines"], responses=error_responses(401))

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Return all metrics in the format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router
