"""Compares every answer of a server with the offline model, at the degree that the answer reports.

Many clients send requests of one to four images to one server at the same time: for any of its
models, at fixed degrees, at the best one, and at the degree that the server chooses. So batches mix
images of many requests. The offline model computes each image alone. The command fails (exit code
1) if a probability differs by more than 1e-4, a grey level of a mask by more than one, or the class
of more than one pixel in a thousand; or if a requested degree is not the one that was run.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.load import Exchange, play_closed
from benchmarks.options import options, parse_options
from benchmarks.played import REFUSED
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report, Row
from benchmarks.server import add_server, serve, server_options
from benchmarks.workload import (
    Workload,
    encode_image,
    mask_of,
    predictions,
    probabilities,
    request_body,
)
from tokendial.runs import Run
from tokendial.tasks import BinaryMasks, Classification
from tokendial.tasks.dense_prediction import best_class, resize_maps

PROBABILITY, GREY, PIXELS = 1e-4, 1 / 255, 1e-3
"""Largest allowed difference between an answer and the offline model, by kind of answer."""
ROUNDS = 20
DEADLINE_MS = 60_000
COLUMNS = (
    Column("what", "model, degree"),
    Column("images", "images"),
    Column("degrees", "degrees reported"),
    Column("batch", "images in a batch", "{:.1f}"),
    Column("apart", "largest difference", "{:.1e}"),
    Column("wrong", "wrong"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """A request for predictions."""

    model: str
    """Name of the model."""
    degree: int | str
    """Degree of the dial, "auto" or "best"."""
    images: tuple[int, ...]
    """Indices of the images."""


class Offline:
    """The model of a run, which computes one image at a time."""

    def __init__(self, run: Run, images: Sequence[Image.Image]) -> None:
        self.model, self.task, self.classes = run.model(), run.task(), run.classes()
        self.transform = self.task.image_transform(self.model.anatomy)
        self.images, self.encoded = images, [encode_image(image) for image in images]
        self.expected = lru_cache(maxsize=None)(self._expected)

    @torch.inference_mode()
    def _expected(self, number: int, degree: int) -> np.ndarray:
        """The expected probabilities [K], or the mask [H, W] of grey levels or classes."""
        image = self.images[number]
        self.model.set_degree(degree)
        logits = self.task.predict(self.model, self.transform(image).unsqueeze(0)).float()
        if isinstance(self.task, Classification):
            return self.task.probabilities(logits)[0].numpy()
        size = image.height, image.width
        if isinstance(self.task, BinaryMasks):
            return resize_maps(logits.sigmoid(), size)[0, 0].mul(255).round().byte().numpy()
        return best_class(logits[0], size).numpy()

    def apart(self, number: int, prediction: dict[str, Any]) -> float:
        """Difference of a prediction from the model's: in probability, or a fraction of pixels."""
        expected = self.expected(number, prediction["degree"])
        if isinstance(self.task, Classification):
            return float(np.abs(probabilities(prediction, self.classes) - expected).max())
        mask = mask_of(prediction)
        if isinstance(self.task, BinaryMasks):
            return float(np.abs(mask.astype(float) - expected).max()) / 255
        return float((mask != expected).mean())

    @property
    def allowed(self) -> float:
        """Largest allowed difference of a prediction."""
        if isinstance(self.task, Classification):
            return PROBABILITY
        return GREY if isinstance(self.task, BinaryMasks) else PIXELS


def random_requests(
    models: Sequence[str], degrees: Sequence[int], *, images: int, requests: int, seed: int
) -> list[Request]:
    """Random requests for one to four images. Half of them let the server choose the degree."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(requests):
        asked = draw.choice(["auto", "best", "fixed"], p=[0.5, 0.25, 0.25])
        found.append(
            Request(
                model=str(draw.choice(models)),
                degree=int(draw.choice(degrees)) if asked == "fixed" else str(asked),
                images=tuple(draw.integers(images, size=draw.integers(1, 5)).tolist()),
            )
        )
    return found


def send_all(
    url: str, requests: Sequence[Request], offline: Mapping[str, Offline], *, clients: int
) -> list[tuple[Request, Exchange]]:
    """Send all requests and return their answers. Refused requests are sent again.

    Args:
        url: URL of the server.
        requests: The requests.
        offline: The offline models with the images, by name.
        clients: Requests that are sent at the same time.

    Raises:
        ValueError: If a request gets an error, or is refused every time.
    """
    done, left = [], [(request, _body(request, offline[request.model])) for request in requests]
    for _ in range(ROUNDS):
        exchanges = play_closed(url, [body for _, body in left], clients=clients, timeout=60)
        pairs = list(zip(left, exchanges, strict=True))
        for (request, _), exchange in pairs:
            if exchange.status not in (200, *REFUSED):
                raise ValueError(f"{request}: {exchange.error or exchange.body.decode()}")
        done += [(request, exchange) for (request, _), exchange in pairs if exchange.status == 200]
        left = [pair for pair, exchange in pairs if exchange.status != 200]
        if not left:
            return done
    raise ValueError(f"{len(left)} requests were refused {ROUNDS} times")


def _body(request: Request, model: Offline) -> bytes:
    """The body of a request as JSON. It asks for all classes and has a late deadline."""
    return request_body(
        [model.encoded[number] for number in request.images],
        model=request.model,
        degree=request.degree,
        deadline_ms=DEADLINE_MS,
        top=len(model.classes),
    )


def compare_answers(
    done: Sequence[tuple[Request, Exchange]], offline: Mapping[str, Offline]
) -> list[Row]:
    """One row per model and kind of degree: fixed, "auto" or "best"."""
    rows: dict[str, list[Row]] = {}
    for request, exchange in done:
        model = offline[request.model]
        answers = predictions(exchange)
        for number, prediction in zip(request.images, answers, strict=True):
            kind = request.degree if isinstance(request.degree, str) else "fixed"
            degree, apart = prediction["degree"], model.apart(number, prediction)
            right = apart <= model.allowed and request.degree in (kind, degree)
            rows.setdefault(f"{request.model}, {kind}", []).append(
                {"degree": degree, "batch": prediction["batch"], "apart": apart, "right": right}
            )
    return [
        {
            "what": what,
            "images": len(some),
            "degrees": sorted({row["degree"] for row in some}),
            "batch": float(np.mean([row["batch"] for row in some])),
            "apart": max(row["apart"] for row in some),
            "wrong": sum(not row["right"] for row in some),
        }
        for what, some in sorted(rows.items())
    ]


def main(arguments: list[str]) -> None:
    """Send requests, compare the answers, write the results, and fail if an answer is wrong."""
    asked = _parse_arguments(arguments)
    runs = [Run(_folder(text)) for text in asked.runs]
    images = Workload(runs[0], asked.images).images
    with serve(asked.runs, *server_options(asked)) as server:
        models = [model["name"] for model in server.get("/v1/models")["models"]]
        offline = {name: Offline(run, images) for name, run in zip(models, runs, strict=True)}
        requests = random_requests(
            models, server.degrees, images=len(images), requests=asked.requests, seed=asked.seed
        )
        done = send_all(server.predict, requests, offline, clients=asked.clients)
    rows = compare_answers(done, offline)
    figure = bar_figure(rows, "what", {"apart": "largest difference", "batch": "images in a batch"})
    Report(f"answers_{runs[0].recipe().model.name}", COLUMNS, rows, figure).write(asked)
    if wrong := sum(row["wrong"] for row in rows):
        sys.exit(f"answers: {wrong} of {sum(row['images'] for row in rows)} are wrong")


def _folder(run: str) -> str:
    """The folder in RUN or NAME=RUN."""
    return run if Path(run).is_dir() else run.partition("=")[2] or run


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = options("answers", __doc__, quick="100 requests")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or NAME=FOLDER")
    add_server(parser)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=48, help="requests sent at the same time")
    return parse_options(parser, arguments, requests=100, images=50)
