"""Routes of the web page, and `/v1/tokens`, which shows the tokens of an image on it."""

import asyncio
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from tokendial.serve.http.errors import refusal_error, retry_after_header
from tokendial.serve.http.openapi import IMAGE_BODIES, error_responses
from tokendial.serve.http.prediction import PredictionHandler
from tokendial.serve.http.schemas import Prediction, PredictOptions
from tokendial.serve.problems import ProblemError
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.workers.supervisor import Supervisor
from tokendial.serve.workers.token_view import TokenView

_MAX_VIEWS = 8
"""Maximum number of concurrent requests for a view of tokens."""
_CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Tokens(TokenView):
    """Response of `/v1/tokens`."""

    model: str
    """Name of the model."""
    revision: str
    """Short hash of the model's weights."""
    gmacs: float
    """Multiply-accumulates of the image, in 1e9."""
    image: str
    """The image as the model sees it: base64 of a PNG."""
    prediction: Prediction
    """The prediction, as `/v1/predict` gives it. Its degree is that of the view."""


def page_routes(api_page: Callable[[], str]) -> APIRouter:
    """Routes `/`, `/docs` and `/page/*`, which need nothing but this server.

    Args:
        api_page: Returns the page that describes the API.
    """
    router = APIRouter(include_in_schema=False)
    contents = {
        file.name: file.read_bytes() for file in (files("tokendial.serve") / "page").iterdir()
    }

    @router.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if name not in contents:
            raise ProblemError(404, "not_found", "Not Found")
        content_type = _CONTENT_TYPES[name.rpartition(".")[2]]
        return Response(contents[name], media_type=content_type, headers=_SECURITY_HEADERS)

    @router.get("/")
    async def index() -> Response:
        return await page_file("index.html")

    @router.get("/docs")
    async def docs() -> Response:
        return Response(api_page(), media_type="text/html", headers=_SECURITY_HEADERS)

    return router


def token_routes(engine: Engine, supervisor: Supervisor, handler: PredictionHandler) -> APIRouter:
    """Route `/tokens`."""
    router = APIRouter(tags=["predict"])
    views = _TokenViewHandler(engine, supervisor, handler)

    @router.post(
        "/tokens",
        response_model=Tokens,
        responses=error_responses(400, 401, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": {"required": True, "content": IMAGE_BODIES}},
    )
    async def tokens(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
        """Return the prediction of one image, and the tokens that each layer merged or dropped."""
        answer = await views.view(request, options)
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


class _TokenViewHandler:
    """Answers requests for views of tokens.

    Predictions have priority: views are made one at a time, between two batches.
    """

    def __init__(self, engine: Engine, supervisor: Supervisor, handler: PredictionHandler) -> None:
        self._engine, self._supervisor, self._handler = engine, supervisor, handler
        self._running = 0
        self._lock = asyncio.Lock()

    async def view(self, request: Request, options: PredictOptions) -> Tokens:
        if self._running == _MAX_VIEWS:
            message = f"At most {_MAX_VIEWS} views of tokens are made at a time."
            raise ProblemError(429, "full", message, headers=retry_after_header(1.0))
        self._running += 1
        try:
            return await self._view(request, options)
        finally:
            self._running -= 1

    async def _view(self, request: Request, options: PredictOptions) -> Tokens:
        # An image whose prediction is refused gets no view either.
        answer, (image,) = await self._handler.predict(request, options, max_images=1)
        name, (prediction,) = answer.model, answer.predictions
        try:
            async with self._lock:
                viewed = await asyncio.wrap_future(
                    self._engine.call_between_batches(
                        lambda: self._supervisor.view(name, prediction.degree, image.tensor)
                    )
                )
        except RequestRefusedError as refused:
            raise refusal_error(refused) from None
        return Tokens(
            **dict(viewed.view),
            model=name,
            revision=answer.revision,
            gmacs=self._supervisor.catalog.models[name].gmacs[prediction.degree],
            image=viewed.image_png,
            prediction=prediction,
        )
