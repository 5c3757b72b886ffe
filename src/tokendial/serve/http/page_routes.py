"""The page, and the tokens of an image for it."""

import asyncio
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from tokendial.serve.http.predicting import Predictor
from tokendial.serve.http.problems import ProblemError, refusal, retry_after
from tokendial.serve.http.routes import IMAGE_BODIES, failures
from tokendial.serve.http.schemas import ClassesPrediction, MaskPrediction, Options
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.scheduling.scheduler import Refused
from tokendial.serve.workers.served import Served
from tokendial.serve.workers.token_view import TokenView

_MOST = 8
"""Views at a time, from the first byte of the request; the page is not what the server is for."""
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Tokens(TokenView):
    """Answer of `/v1/tokens`."""

    model: str
    revision: str
    """Short hash of the model's weights."""
    gmacs: float
    """Multiply-accumulates of the image, in 1e9."""
    image: str
    """What the model sees: base64 of a PNG."""
    prediction: ClassesPrediction | MaskPrediction
    """As `/v1/predict` gives it; its degree is that of the view."""


def page(api_page: Callable[[], str]) -> APIRouter:
    """`/`, `/docs` and `/page/*`: what a browser shows, from this server alone.

    Args:
        api_page: Writes the page that describes the requests.
    """
    router = APIRouter(include_in_schema=False)
    contents = {
        file.name: file.read_bytes() for file in (files("tokendial.serve") / "page").iterdir()
    }

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in contents:
            raise ProblemError(404, "not_found", "Not Found")
        kind = _KINDS[name.rpartition(".")[2]]
        return Response(contents[name], media_type=kind, headers=_HEADERS)

    @router.get("/")
    async def index() -> Response:
        return await part("index.html")

    @router.get("/docs")
    async def docs() -> Response:
        return Response(api_page(), media_type="text/html", headers=_HEADERS)

    return router


def tokens(engine: Engine, served: Served, predictor: Predictor) -> APIRouter:
    """`/tokens`."""
    router = APIRouter(tags=["predict"])
    views = _Views(engine, served, predictor)

    @router.post(
        "/tokens",
        response_model=Tokens,
        responses=failures(400, 401, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": {"required": True, "content": IMAGE_BODIES}},
    )
    async def tokens(request: Request, options: Annotated[Options, Query()]) -> Response:
        """The prediction of one image, and which of its tokens each layer merged or dropped."""
        answer = await views(request, options)
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


class _Views:
    """Views of tokens, which come after predictions: few are made, one by one between batches."""

    def __init__(self, engine: Engine, served: Served, predictor: Predictor) -> None:
        self._engine, self._served, self._predictor = engine, served, predictor
        self._going = 0
        self._turn = asyncio.Lock()

    async def __call__(self, request: Request, options: Options) -> Tokens:
        if self._going == _MOST:
            message = f"At most {_MOST} views of tokens are made at a time."
            raise ProblemError(429, "full", message, headers=retry_after(1.0))
        self._going += 1
        try:
            return await self._view(request, options)
        finally:
            self._going -= 1

    async def _view(self, request: Request, options: Options) -> Tokens:
        # An image that is refused, or not answered in time, is not looked into either.
        predictions, (image,) = await self._predictor.predicted(request, options, most=1)
        name, (prediction,) = predictions.model, predictions.predictions
        try:
            async with self._turn:
                view, seen = await asyncio.wrap_future(
                    self._engine.call(
                        lambda: self._served.view(name, prediction.degree, image.tensor)
                    )
                )
        except Refused as refused:
            raise refusal(refused) from None
        return Tokens(
            **dict(view),
            model=name,
            revision=predictions.revision,
            gmacs=self._served.facts.gmacs(name, prediction.degree),
            image=seen,
            prediction=prediction,
        )
