"""`/v1/predict` and `/v1/embeddings`: requests are read, decoded, queued, computed and answered.

All work for a request is cancelled as soon as its client goes away.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from torch import Tensor

from tokendial.serve.http.admission import RequestMemory
from tokendial.serve.http.errors import refusal_error
from tokendial.serve.http.metrics import Metrics
from tokendial.serve.http.openapi import IMAGE_BODIES, error_responses
from tokendial.serve.http.schemas import (
    Class,
    ClassesPrediction,
    ComputeOptions,
    Embedding,
    EmbeddingBody,
    EmbeddingOptions,
    Embeddings,
    MaskPrediction,
    ModelChoice,
    PredictBody,
    Prediction,
    Predictions,
    PredictOptions,
)
from tokendial.serve.http.uploads import Body, OptionsT, Upload, read_upload
from tokendial.serve.problems import ProblemError
from tokendial.serve.scheduling.engine import Engine, ImageResult
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.settings import Settings
from tokendial.serve.workers.decoder_messages import DecodeImage, RenderMask
from tokendial.serve.workers.decoder_pool import DecoderPool, PreparedImage
from tokendial.serve.workers.messages import ImageToEmbed
from tokendial.serve.workers.supervisor import Supervisor

_MASK_COPIES = 2
"""Copies of a mask in memory: as it was rendered, and as it is sent."""
_NUMBER_BYTES = 64
"""Memory of a number of an embedding while it is answered: as an object, and as text."""
_PIECE_BYTES = 262_144
"""Bytes of an answer that are handed to the connection at a time."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Computed(Generic[OptionsT]):
    """A request whose images have run."""

    name: str
    """Name of the model."""
    options: OptionsT
    """Options of the request."""
    images: list[PreparedImage]
    """The decoded images."""
    results: list[ImageResult]
    """Result of each image."""


class PredictionHandler:
    """Answers requests for predictions and embeddings. To be used in one event loop."""

    def __init__(
        self,
        engine: Engine,
        supervisor: Supervisor,
        settings: Settings,
        metrics: Metrics,
        decoders: DecoderPool,
    ) -> None:
        self.degrees = supervisor.catalog.allowed_degrees(
            settings.max_degree, settings.min_accuracy
        )
        """Degrees that clients may ask for."""
        self._engine, self._supervisor, self._settings = engine, supervisor, settings
        self._metrics, self._decoders = metrics, decoders
        self._slo_s = settings.engine_slo_s

    async def predict(
        self, request: Request, options: PredictOptions, *, max_images: int
    ) -> tuple[Predictions, list[PreparedImage]]:
        """Answer a request for predictions.

        Args:
            request: The request; nothing of its body has been read yet.
            options: Its query parameters.
            max_images: Maximum number of images.

        Returns:
            The answer, and the decoded images.

        Raises:
            ProblemError: If the request is invalid or refused.
        """
        memory: RequestMemory = request.state.memory

        async def describe(done: _Computed[PredictOptions]) -> Predictions:
            predictions = await self._predictions(
                done.name, done.images, done.results, done.options.top, memory
            )
            return Predictions(
                model=done.name, revision=self._revision(done.name), predictions=predictions
            )

        return await self._answer(request, options, PredictBody, describe, max_images=max_images)

    async def embed(
        self, request: Request, options: EmbeddingOptions, *, max_images: int
    ) -> Embeddings:
        """Answer a request for embeddings; the arguments and errors are those of `predict`."""
        memory: RequestMemory = request.state.memory

        async def describe(done: _Computed[EmbeddingOptions]) -> Embeddings:
            data = await _described_embeddings(done.results, done.options.encoding_format, memory)
            return Embeddings(model=done.name, revision=self._revision(done.name), data=data)

        answer, _ = await self._answer(
            request, options, EmbeddingBody, describe, max_images=max_images
        )
        return answer

    async def _answer(
        self,
        request: Request,
        options: OptionsT,
        body: Body,
        describe: Callable[[_Computed[OptionsT]], Awaitable[T]],
        *,
        max_images: int,
    ) -> tuple[T, list[PreparedImage]]:
        """Read a request, run its images, and describe the results.

        Args:
            request: The request; nothing of its body has been read yet.
            options: Its query parameters.
            body: What a JSON body holds. It decides what the images are run for.
            describe: Makes the answer.
            max_images: Maximum number of images.

        Returns:
            The answer, and the decoded images.

        Raises:
            ProblemError: If the request is invalid or refused.
        """
        # On Ray, a front has received the whole request and may have held it for some time.
        held_s: float = getattr(request.state, "held_s", 0.0)
        began = time.monotonic() - held_s
        upload = await read_upload(request, options, body, self._settings, max_images=max_images)
        received = time.monotonic() - held_s
        options = upload.options
        name = self.model_name(options)
        degree = self._fixed_degree(name, options)
        # A deadline of the client counts from the first byte. The server's objective counts from
        # the last one, because the client determines how fast it sends.
        if options.deadline_ms is None:
            deadline = received + self._slo_s
        else:
            deadline = began + self._check_deadline(options.deadline_ms) / 1000
        try:
            work = self._compute(name, upload, degree, deadline, embed=body is EmbeddingBody)
            images, results = await unless_disconnected(request, work)
            answer = await describe(_Computed(name, options, images, results))
        except RequestRefusedError as refused:
            self._metrics.count_refusal(refused.reason, len(upload.images))
            raise refusal_error(refused) from None
        seconds = time.monotonic() - received
        for result in results:
            self._metrics.count_answer(name, result.degree, seconds)
        return answer, images

    def _revision(self, name: str) -> str:
        return self._supervisor.catalog.models[name].revision

    def model_name(self, choice: ModelChoice) -> str:
        """Name of the model that a request is about; raise a ProblemError if it is unknown."""
        names = self._supervisor.catalog.names
        if choice.model is not None and choice.model not in names:
            message = f"There is no such model; served are {', '.join(names)}."
            raise ProblemError(404, "unknown_model", message, "model")
        return choice.model or names[0]

    def _fixed_degree(self, name: str, options: ComputeOptions) -> int | None:
        """Degree that a request asks for; None: the degree of the dial."""
        if options.degree == "auto":
            return None
        if options.degree == "best":
            # Unknown accuracies count as 0; if none is known, the first degree is the best.
            catalog = self._supervisor.catalog
            return max(self.degrees, key=lambda degree: catalog.accuracy(name, degree) or 0.0)
        if options.degree not in self.degrees:
            message = f"The dial has the degrees {', '.join(map(str, self.degrees))}."
            raise ProblemError(422, "invalid", message, "degree")
        return options.degree

    def _check_deadline(self, deadline_ms: float) -> float:
        longest = self._settings.max_deadline_ms
        if deadline_ms > longest:
            message = f"At most {longest:g} ms are allowed."
            raise ProblemError(422, "invalid", message, "deadline_ms")
        return deadline_ms

    async def _compute(
        self,
        name: str,
        upload: Upload[OptionsT],
        degree: int | None,
        deadline: float,
        *,
        embed: bool,
    ) -> tuple[list[PreparedImage], list[ImageResult]]:
        """Decode the images and run them."""
        images = await self._decode(name, upload, degree, deadline)
        if upload.options.deadline_ms is None:
            # The objective is about the load. An image that takes half of it to decode is large,
            # and would be refused on an idle machine as well. So the deadline moves by the excess.
            decode_s = sum(image.seconds for image in images)
            decode_s /= min(len(images), self._settings.decoders)
            deadline += max(0.0, decode_s - self._slo_s / 2)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            message = "the deadline passed while the image was decoded."
            raise RequestRefusedError("late", message, 1.0)
        inputs = [ImageToEmbed(i.tensor) if embed else i.tensor for i in images]
        future = self._engine.submit(name, inputs, degree=degree, within_s=left_s)
        return images, await asyncio.wrap_future(future)

    async def _decode(
        self, name: str, upload: Upload[OptionsT], degree: int | None, deadline: float
    ) -> list[PreparedImage]:
        """Decode the images, unless it is already clear that they cannot be answered in time."""
        # The wait for a decoder is known from recent images. The decoding time of these images is
        # not predicted: after a few large images, a prediction would refuse every image, and
        # nothing would correct it.
        within_s = deadline - time.monotonic() - self._decoders.wait_s
        count, ahead = len(upload.images), self._decoders.ahead
        self._engine.check(name, count, degree=degree, within_s=within_s, ahead=ahead)
        catalog, futures = self._supervisor.catalog, []
        for index, file in enumerate(upload.images):
            message = DecodeImage(
                name=name,
                model=catalog.models[name],
                label=f"images[{index}]",
                base64=upload.base64,
                max_pixels=self._settings.max_pixels,
                input_shape=catalog.input_shape,
                cpu_limit_s=self._settings.max_decode_s,
            )
            future = self._decoders.decode(message, file, rank=index, deadline=deadline)
            futures.append(asyncio.wrap_future(future))
        try:
            return await asyncio.gather(*futures)
        finally:
            for waiting in futures:  # those that are left if one failed or the client is gone
                waiting.cancel()

    async def _predictions(
        self,
        name: str,
        images: list[PreparedImage],
        results: list[ImageResult],
        top: int,
        memory: RequestMemory,
    ) -> Sequence[Prediction]:
        """Describe the result of each image."""
        kind = self._supervisor.catalog.kind(name)
        if kind == "embeddings":
            return await _described_embeddings(results, "float", memory)
        if kind == "classes":
            predictions = []
            for result in results:
                predictions.append(self._classes(name, result, top))
                await asyncio.sleep(0)  # many classes of many images must not block the event loop
            return predictions
        pairs = zip(images, results, strict=True)
        return list(await asyncio.gather(*(self._mask(name, *pair, memory) for pair in pairs)))

    def _classes(self, name: str, result: ImageResult, top: int) -> ClassesPrediction:
        likely = self._supervisor.catalog.likely_classes(name, result.output, top)
        classes = [Class(name=label, probability=probability) for label, probability in likely]
        return ClassesPrediction(**_computed_fields(result), classes=classes)

    async def _mask(
        self, name: str, image: PreparedImage, result: ImageResult, memory: RequestMemory
    ) -> MaskPrediction:
        message = RenderMask(
            name=name,
            model=self._supervisor.catalog.models[name],
            logits_shape=tuple(result.output.shape),
            size=image.size,
            cpu_limit_s=self._settings.max_decode_s,
        )
        deadline = time.monotonic() + self._settings.timeout_s
        mask = await asyncio.wrap_future(
            self._decoders.render(message, result.output, deadline=deadline)
        )
        memory.take(_MASK_COPIES * len(mask.png))
        fields = _computed_fields(result)
        return MaskPrediction(**fields, mask=mask.png.decode(), share=mask.share)


def prediction_routes(handler: PredictionHandler, settings: Settings) -> APIRouter:
    """Routes `/predict` and `/embeddings`."""
    router = APIRouter(tags=["predict"])
    responses = error_responses(400, 401, 404, 408, 413, 415, 422, 429, 503)

    @router.post(
        "/predict",
        response_model=Predictions,
        responses=responses,
        openapi_extra=_request_body(PredictBody),
    )
    async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
        """Return what the model gives for one image (its bytes) or several (a form, or JSON).

        That is classes or a mask, or an embedding if the model was trained to keep embeddings.

        A JSON request has its options as fields of the body; all others have query parameters.
        """
        answer, _ = await handler.predict(request, options, max_images=settings.max_images)
        return await _json_response(answer, "predictions", answer.predictions)

    @router.post(
        "/embeddings",
        response_model=Embeddings,
        responses=responses,
        openapi_extra=_request_body(EmbeddingBody),
    )
    async def embeddings(
        request: Request, options: Annotated[EmbeddingOptions, Query()]
    ) -> Response:
        """Return embeddings of images: what the model gives before its classifier.

        Requests are those of `/v1/predict`. A model of masks gives the embeddings of its backbone.
        """
        answer = await handler.embed(request, options, max_images=settings.max_images)
        return await _json_response(answer, "data", answer.data)

    return router


def _request_body(body: Body) -> dict[str, Any]:
    """Describe the bodies that a route takes, for the OpenAPI description."""
    json_body = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": IMAGE_BODIES | json_body}}


async def unless_disconnected(request: Request, work: Coroutine[None, None, T]) -> T:
    """Await some work, and cancel it if the client goes away.

    Raises:
        ClientDisconnect: If the client went away first.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        disconnected.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _computed_fields(result: ImageResult) -> dict[str, Any]:
    return {
        "degree": result.degree,
        "unsure_at": result.unsure_at,
        "queue_ms": 1000 * result.queue_s,
        "compute_ms": 1000 * result.compute_s,
        "batch": result.batch,
    }


async def _described_embeddings(
    results: Sequence[ImageResult], form: Literal["float", "base64"], memory: RequestMemory
) -> list[Embedding]:
    """Describe the embedding of each image, and count the memory that they take."""
    rows = []
    for index, result in enumerate(results):
        memory.take(_NUMBER_BYTES * result.output.numel())
        embedding = _written_embedding(result.output, form)
        rows.append(Embedding(**_computed_fields(result), index=index, embedding=embedding))
        await asyncio.sleep(0)  # many images must not block the event loop
    return rows


def _written_embedding(values: Tensor, form: Literal["float", "base64"]) -> list[float] | str:
    """An embedding as a list of numbers, or as base64 of its float32 numbers, little-endian."""
    if form == "base64":
        return base64.b64encode(values.numpy().astype(np.dtype("<f4")).tobytes()).decode()
    numbers: list[float] = values.tolist()
    return numbers


async def _json_response(
    answer: Predictions | Embeddings, field: str, rows: Sequence[BaseModel]
) -> Response:
    """Serialise an answer image by image, so that no step blocks the event loop for long.

    Args:
        answer: The answer.
        field: Its field that holds the rows, the last one.
        rows: One row for each image.
    """
    # It was validated when it was made. FastAPI would validate it again, which takes longer than
    # serialising it.
    parts = []
    for row in rows:
        parts.append(row.model_dump_json().encode())
        await asyncio.sleep(0)
    rest = answer.model_dump_json(exclude={field}).encode()
    body = b'%b,"%b":[%b]}' % (rest[:-1], field.encode(), b",".join(parts))
    return _PiecewiseResponse(body, media_type="application/json")


class _PiecewiseResponse(Response):
    """Response that is sent in pieces, each after the client has read the ones before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        body = memoryview(self.body)
        for at in range(0, len(body), _PIECE_BYTES):
            piece = {"body": bytes(body[at : at + _PIECE_BYTES]), "more_body": True}
            await send({"type": "http.response.body", **piece})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
