"""One request: read, decoded, queued, answered; given up as soon as nobody waits for it."""

import asyncio
import time
from base64 import b64encode
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect
from torch import Tensor

from tokendial.serve.engine import Answer, Engine
from tokendial.serve.facts import Classes
from tokendial.serve.metrics import Metrics
from tokendial.serve.problems import ProblemError, refusal
from tokendial.serve.scheduler import Refused
from tokendial.serve.schemas import (
    Class,
    ClassesPrediction,
    MaskPrediction,
    OfModel,
    Options,
    Predictions,
)
from tokendial.serve.served import Served
from tokendial.serve.settings import Settings
from tokendial.serve.uploads import Upload, receive, to_image

_TOP = 5
_LEARNT = 0.1
"""Share of a surprise in the time of decoding that is believed."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as the model takes it."""

    tensor: Tensor
    """[3, H, W]."""
    size: tuple[int, int]
    """Height and width of the image itself, in pixels."""
    seconds: float
    """That it took."""


class Predictor:
    """Answers requests of one event loop."""

    def __init__(
        self, engine: Engine, served: Served, settings: Settings, metrics: Metrics
    ) -> None:
        self.degrees = served.facts.ladder(settings.max_degree, settings.min_accuracy)
        self._engine, self._served, self._settings = engine, served, settings
        self._metrics = metrics
        # Threads are bounded, so that decoding leaves room for the model and for the event loop.
        self._decoders = anyio.CapacityLimiter(settings.decoders)
        self._painters = anyio.CapacityLimiter(settings.decoders)
        self._decoding, self._decode_s = 0, 0.0

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
        degree, top = self.degree_of(name, asked), self._top_of(name, asked)
        # What a client says counts from its first byte; our own promise, from its last: how fast
        # it sends is not in our hands.
        until = whole + self._settings.engine_slo_s
        if asked.deadline_ms is not None:
            until = began + asked.deadline_ms / 1000
        try:
            work = self._answers(name, upload, degree, until, asked.deadline_ms is None)
            images, answers = await unless_gone(request, work)
        except Refused as refused:
            self._metrics.refused(refused.reason, len(upload.images))
            raise refusal(refused) from None
        told = await asyncio.gather(
            *(self._told(name, *each, top) for each in zip(images, answers, strict=True))
        )
        seconds = time.monotonic() - whole
        for answer in answers:
            self._metrics.answered(name, answer.degree, seconds)
        revision = self._served.facts.revision(name)
        return Predictions(model=name, revision=revision, predictions=list(told)), images

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

    def _top_of(self, name: str, options: Options) -> int:
        classes = len(self._served.facts.classes(name))
        if options.top is not None and options.top > classes:
            raise ProblemError(422, "invalid", f"The model has {classes} classes.", "top")
        return options.top or min(_TOP, classes)

    async def prepare(
        self, name: str, upload: Upload, degree: int | None, until: float
    ) -> list[Prepared]:
        """Decode images in worker threads, if they can still be answered in time.

        Raises:
            Refused: If they cannot: what will not be answered shall not cost a decoding.
        """
        count, ahead = len(upload.images), self._decoding
        # Those ahead are told by what was decoded lately; the time of this one is not foreseen, or
        # a few large images could keep everything out that would teach otherwise.
        begins = time.monotonic() + ahead // self._settings.decoders * self._decode_s
        self._engine.check(name, count, degree=degree, within_s=until - begins, ahead=ahead)
        self._decoding += count
        try:
            # A lot of images for each thread: to go to one and back takes as long as a small image.
            lots = min(count, self._settings.decoders)
            found = await asyncio.gather(
                *(
                    anyio.to_thread.run_sync(
                        partial(self._lot, name, upload, range(first, count, lots), until),
                        limiter=self._decoders,
                    )
                    for first in range(lots)
                )
            )
            return [found[index % lots][index // lots] for index in range(count)]
        finally:
            self._decoding -= count

    def _lot(self, name: str, upload: Upload, lot: range, until: float) -> list[Prepared]:
        return [self._prepared(name, upload.images[i], upload.name(i), until) for i in lot]

    def _prepared(self, name: str, file: bytes | str, called: str, until: float) -> Prepared:
        began = time.monotonic()
        if began > until:
            raise Refused("late", "the deadline went by before the image was decoded.", 1.0)
        value_range = self._served.facts.tasks[name].value_range
        image = to_image(file, called, self._settings, value_range)
        tensor = self._served.facts.prepare(name, image)
        seconds = time.monotonic() - began
        self._decode_s += _LEARNT * (seconds - self._decode_s)
        return Prepared(tensor, (image.height, image.width), seconds)

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
        self, name: str, image: Prepared, answer: Answer, top: int
    ) -> ClassesPrediction | MaskPrediction:
        told = partial(self._served.facts.answer, name, answer.output, image.size, top)
        if self._served.facts.kind(name) == "classes":
            found = told()  # takes less time than a thread
        else:
            found = await anyio.to_thread.run_sync(told, limiter=self._painters)
        computed = {
            "degree": answer.degree,
            "queue_ms": 1000 * answer.queue_s,
            "compute_ms": 1000 * answer.compute_s,
            "batch": answer.batch,
        }
        if isinstance(found, Classes):
            pairs = zip(found.names, found.probabilities, strict=True)
            classes = [Class(name=name, probability=value) for name, value in pairs]
            return ClassesPrediction(**computed, classes=classes)
        mask = b64encode(found.png).decode()
        return MaskPrediction(**computed, mask=mask, share=found.share)


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
