"""The paths: predictions, what is served and how it goes, and what machines ask for."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from tokendial.serve.http.metrics import CONTENT_TYPE, Metrics
from tokendial.serve.http.predicting import Predictor
from tokendial.serve.http.problems import ProblemError
from tokendial.serve.http.schemas import (
    Degree,
    Degrees,
    Failure,
    Live,
    Model,
    Models,
    OfModel,
    Options,
    PredictBody,
    Predictions,
)
from tokendial.serve.http.uploads import FORMATS
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.workers.served import Served

_TOLD = {
    400: "The body is broken.",
    401: "An API key is needed.",
    403: "It comes from the page of another site.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "Too many bytes, values, images or pixels, or too much work to decode.",
    415: "A body of a kind that is not taken.",
    421: "The header Host names no host of this server.",
    422: "A value that is not allowed, or no image.",
    429: "Too many images wait; the header Retry-After says when to try again.",
    503: "The deadline cannot be made, or the server stops; Retry-After says when to try again.",
}
_BY_THE_HEAD = (403, 421)
"""What any path may answer."""
_PIECE = 262_144
_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "properties": {"images": {"type": "array", "items": _FILE, "minItems": 1}},
    "required": ["images"],
    "additionalProperties": False,
}
IMAGE_BODIES: dict[str, Any] = {f"image/{kind.lower()}": {"schema": _FILE} for kind in FORMATS}
IMAGE_BODIES |= {"application/octet-stream": {"schema": _FILE}}
IMAGE_BODIES |= {"multipart/form-data": {"schema": _FORM}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a path may answer beside success, for the OpenAPI page."""
    return {
        status: {"model": Failure, "description": _TOLD[status]}
        for status in sorted({*statuses, *_BY_THE_HEAD})
    }


async def in_pieces(answer: Predictions) -> Response:
    """The answer as JSON, written and sent in pieces that keep the event loop for a moment each."""
    # Checked when it was made; checking it again would take longer than writing it.
    parts = []
    for prediction in answer.predictions:
        parts.append(prediction.model_dump_json().encode())
        await asyncio.sleep(0)
    rest = answer.model_dump_json(exclude={"predictions"}).encode()
    return _Pieces(
        b'%b,"predictions":[%b]}' % (rest[:-1], b",".join(parts)), media_type="application/json"
    )


class _Pieces(Response):
    """A response that waits for the client to take what was sent before more of it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        body = memoryview(self.body)
        for at in range(0, len(body), _PIECE):
            piece = {"body": bytes(body[at : at + _PIECE]), "more_body": True}
            await send({"type": "http.response.body", **piece})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def predictions(predictor: Predictor) -> APIRouter:
    """`/predict`."""
    router = APIRouter(tags=["predict"])
    json_body = {"application/json": {"schema": PredictBody.model_json_schema()}}
    body = {"required": True, "content": IMAGE_BODIES | json_body}

    @router.post(
        "/predict",
        response_model=Predictions,
        responses=failures(400, 401, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": body},
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Classes or masks of one image (its bytes), or of several (a form, or JSON).

        The options of JSON are fields of its body, those of all else are query parameters.
        """
        return await in_pieces(await predictor(request, options))

    return router


def about(engine: Engine, served: Served, predictor: Predictor, metrics: Metrics) -> APIRouter:
    """`/models`, `/degrees`, `/live`."""
    router = APIRouter(tags=["about"], responses=failures(401))

    @router.get("/models")
    async def models() -> Models:
        """What is served."""
        return Models(
            models=[
                Model(
                    name=name,
                    kind=served.facts.kind(name),
                    classes=list(served.facts.classes(name)),
                    revision=served.facts.revision(name),
                    default=name == served.facts.names[0],
                )
                for name in served.facts.names
            ]
        )

    @router.get("/degrees", responses=failures(404, 422))
    async def degrees(options: Annotated[OfModel, Query()]) -> Degrees:
        """The dial: where it is, what each degree costs here, and what it is worth."""
        name = predictor.name_of(options)
        return Degrees(
            model=name,
            degree=engine.status().degree,
            degrees=[
                Degree(
                    degree=degree,
                    gmacs=served.facts.gmacs(name, degree),
                    ms=1000 * engine.seconds(name, degree),
                    accuracy=served.facts.accuracy(name, degree),
                )
                for degree in predictor.degrees
            ],
        )

    @router.get("/live")
    async def live() -> Live:
        """Load, degree and latency, now and in the last minute."""
        return metrics.live()

    return router


def machines(engine: Engine) -> APIRouter:
    """`/healthz` and `/readyz`."""
    router = APIRouter(tags=["machines"])

    @router.get("/healthz", responses=failures(503))
    async def healthz() -> dict[str, str]:
        """Whether this process is of any use."""
        if not engine.useful:
            raise ProblemError(503, "stopped", "The engine does not run, or has no model.")
        return {"status": "ok"}

    @router.get("/readyz", responses=failures(503))
    async def readyz() -> dict[str, str]:
        """Whether requests should be sent here."""
        if not engine.ready:
            message = "The server is starting or stopping, or its model is started again."
            raise ProblemError(503, "not_ready", message)
        return {"status": "ready"}

    return router


def numbers(metrics: Metrics) -> APIRouter:
    """`/metrics`."""
    router = APIRouter(tags=["machines"], responses=failures(401))

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router
