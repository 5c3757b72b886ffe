"""One request: read, decoded, queued, answered; given up as soon as nobody waits for it."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from tokendial.serve.http.memory import Held
from tokendial.serve.http.metrics import Metrics
from tokendial.serve.http.problems import ProblemError, refusal
from tokendial.serve.http.schemas import (
    Class,
    ClassesPrediction,
    MaskPrediction,
    OfModel,
    Options,
    Predictions,
)
from tokendial.serve.http.uploads import Upload, receive
from tokendial.serve.scheduling.engine import Answer, Engine
from tokendial.serve.scheduling.scheduler import Refused
from tokendial.serve.settings import Settings
from tokendial.serve.workers.decoding import DecoderPool, Prepared
from tokendial.serve.workers.facts import Classes
from tokendial.serve.workers.served import Served

_COPIES = 2
"""Of a mask: as it was painted, and as it is sent."""
T = TypeVar("T")


class Predictor:
    """Answers requests of one event loop."""

    def __init__(
        self,
        engine: Engine,
        served: Served,
        settings: Settings,
        metrics: Metrics,
        decoders: DecoderPool,
    ) -> None:
        self.degrees = served.facts.ladder(settings.max_degree, settings.min_accuracy)
        self._engine, self._served, self._settings = engine, served, settings
        self._metrics, self._decoders = metrics, decoders

    async def __call__(self, request: Request, options: Options) -> Predictions:
        """Answer a request.

        Raises:
            ProblemError: If it is not in order, or has to be refused.
        """
        return (await self.predicted(request, options, self._settings.max_images))[0]

    async def predicted(
        self, request: Request, options: Options, most: int
    ) -> tuple[Predictions, list[Prepared]]:
        """The answer to a request of at most so many images, and the images."""
        # Whoever passed it on, on Ray, may have held it for a while.
        held_s: float = getattr(request.state, "held_s", 0.0)
        began = time.monotonic() - held_s
        settings = self._settings.model_copy(update={"max_images": most})
        upload = await receive(request, options, settings)
        whole = time.monotonic() - held_s
        asked = upload.options
        name = self.name_of(asked)
        degree = self.degree_of(name, asked)
        # What a client says counts from its first byte; our own promise, from its last: how fast
        # it sends is not in our hands.
        until = whole + self._settings.engine_slo_s
        if asked.deadline_ms is not None:
            until = began + self._checked(asked.deadline_ms) / 1000
        try:
            work = self._answers(name, upload, degree, until, asked.deadline_ms is None)
            images, answers = await unless_gone(request, work)
            told = await self._told(name, images, answers, asked.top, request.state.held)
        except Refused as refused:
            self._metrics.refused(refused.reason, len(upload.images))
            raise refusal(refused) from None
        seconds = time.monotonic() - whole
        for answer in answers:
            self._metrics.answered(name, answer.degree, seconds)
        revision = self._served.facts.revision(name)
        return Predictions(model=name, revision=revision, predictions=told), images

    def name_of(self, options: OfModel) -> str:
        """The model that is asked for."""
        names = self._served.facts.names
        if options.model is not None and options.model not in names:
            message = f"There is no such model; served are {', '.join(names)}."
            raise ProblemError(404, "unknown_model", message, "model")
        return options.model or names[0]

    def degree_of(self, name: str, options: Options) -> int | None:
        """The degree that is asked for; None: the dial's."""
        if options.degree == "auto":
            return None
        if options.degree == "best":
            # As evaluated; where that was not done, the first one, which reduces nothing.
            return max(
                self.degrees, key=lambda degree: self._served.facts.accuracy(name, degree) or 0.0
            )
        if options.degree not in self.degrees:
            message = f"The dial has the degrees {', '.join(map(str, self.degrees))}."
            raise ProblemError(422, "invalid", message, "degree")
        return options.degree

    def _checked(self, deadline_ms: float) -> float:
        most = self._settings.max_deadline_ms
        if deadline_ms > most:
            raise ProblemError(422, "invalid", f"At most {most:g} ms are waited.", "deadline_ms")
        return deadline_ms

    async def prepare(
        self, name: str, upload: Upload, degree: int | None, until: float
    ) -> list[Prepared]:
        """Decode images, if they can still be answered in time.

        Raises:
            Refused: If they cannot: what will not be answered shall not cost a decoding.
        """
        # Those ahead are told by what was decoded lately; the time of this one is not foreseen, or
        # a few large images could keep everything out that would teach otherwise.
        within_s = until - time.monotonic() - self._decoders.wait_s
        count, ahead = len(upload.images), self._decoders.ahead
        self._engine.check(name, count, degree=degree, within_s=within_s, ahead=ahead)
        futures = [
            asyncio.wrap_future(
                self._decoders.prepare(
                    name,
                    self._served.facts.tasks[name],
                    image,
                    called=upload.name(index),
                    rank=index,
                    until=until,
                    shape=self._served.facts.input_shape,
                    settings=self._settings,
                    base64=upload.base64,
                )
            )
            for index, image in enumerate(upload.images)
        ]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:  # the others, if one of them failed or the client is gone
                future.cancel()

    async def _answers(
        self, name: str, upload: Upload, degree: int | None, until: float, own: bool
    ) -> tuple[list[Prepared], list[Answer]]:
        images = await self.prepare(name, upload, degree, until)
        if own:
            # The promise is about the load. An image that takes half of it to decode is large, and
            # would be refused on an idle machine, too: it is given the time that it takes more.
            decoding = sum(image.seconds for image in images)
            decoding /= min(len(images), self._settings.decoders)
            until += max(0.0, decoding - self._settings.engine_slo_s / 2)
        left = until - time.monotonic()
        if left <= 0:
            raise Refused("late", "the deadline went by while the image was decoded.", 1.0)
        tensors = [image.tensor for image in images]
        future = self._engine.submit(name, tensors, degree=degree, within_s=left)
        return images, await asyncio.wrap_future(future)

    async def _told(
        self, name: str, images: list[Prepared], answers: list[Answer], top: int, held: Held
    ) -> list[ClassesPrediction | MaskPrediction]:
        """What clients are told of each image."""
        if self._served.facts.kind(name) == "classes":
            told: list[ClassesPrediction | MaskPrediction] = []
            for image, answer in zip(images, answers, strict=True):
                told.append(self._classes(name, image, answer, top))
                await asyncio.sleep(0)  # there may be many classes, and many images
            return told
        pairs = zip(images, answers, strict=True)
        return list(await asyncio.gather(*(self._mask(name, *pair, held) for pair in pairs)))

    def _classes(self, name: str, image: Prepared, answer: Answer, top: int) -> ClassesPrediction:
        found = self._served.facts.answer(name, answer.output, image.size, top)
        assert isinstance(found, Classes)
        pairs = zip(found.names, found.probabilities, strict=True)
        classes = [Class(name=name, probability=value) for name, value in pairs]
        return ClassesPrediction(**_computed(answer), classes=classes)

    async def _mask(self, name: str, image: Prepared, answer: Answer, held: Held) -> MaskPrediction:
        painted = await asyncio.wrap_future(
            self._decoders.paint(
                name,
                self._served.facts.tasks[name],
                answer.output,
                image.size,
                until=time.monotonic() + self._settings.timeout_s,
                settings=self._settings,
            )
        )
        held.take(_COPIES * len(painted.png))
        return MaskPrediction(**_computed(answer), mask=painted.png.decode(), share=painted.share)


def _computed(answer: Answer) -> dict[str, Any]:
    return {
        "degree": answer.degree,
        "queue_ms": 1000 * answer.queue_s,
        "compute_ms": 1000 * answer.compute_s,
        "batch": answer.batch,
    }


async def unless_gone(request: Request, work: Coroutine[None, None, T]) -> T:
    """Do some work, and give it up when the client goes away.

    Raises:
        ClientDisconnect: If it went.
    """
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
