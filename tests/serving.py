"""A server in a thread, and what a client sends."""

import atexit
import functools
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from PIL import Image

from tokendial.runs import Run
from tokendial.serve.http.app import create_app
from tokendial.serve.http.server import Server, bind_socket
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.settings import check_settings
from tokendial.serve.starting import start_engine
from tokendial.serve.workers import served_runs as served_runs_module
from tokendial.serve.workers.decoder_pool import DecoderPool
from tokendial.serve.workers.messages import TokensViewed
from tokendial.serve.workers.served_runs import ServedRuns

# The machine of the tests may be busy: what they are about is never the time.
PATIENT = {"port": 0, "slo_ms": 60_000, "max_batch": 4}


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        return self.json["error"]


@dataclass(frozen=True, slots=True)
class Serving:
    port: int
    engine: Engine
    served: ServedRuns
    server: Server
    thread: threading.Thread

    def ask(
        self,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        kind: str | None = None,
        method: str | None = None,
        **headers: str,
    ) -> Reply:
        """Send a request over a connection of its own."""
        if kind is not None:
            headers["content-type"] = kind
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            client.request(method or ("GET" if body is None else "POST"), path, body, headers)
            reply = client.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            client.close()

    def predict(self, *images: bytes, query: str = "") -> Reply:
        """Ask for images, in a form."""
        return self.ask(f"/v1/predict{query}", *form(*images))

    def connect(self, text: bytes = b"") -> socket.socket:
        """A connection over which some bytes have been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(text)
        return connection

    @property
    def decoders(self) -> psutil.Process:
        """The process that starts decoders."""
        return psutil.Process(decoders()._process.pid)

    def lag_s(self) -> float:
        """The longest time in the last minute that the event loop was late."""
        lines = self.ask("/metrics").body.decode().splitlines()
        (line,) = (line for line in lines if line.startswith("tokendial_event_loop_lag_seconds "))
        return float(line.split()[1])

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let the engine do nothing for a while."""
        begun, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            go_on.wait()

        self.engine.call_between_batches(wait)
        begun.wait()
        try:
            yield
        finally:
            go_on.set()


class InProcessSupervisor:
    """Runs models in the process of the tests, because a process of their own starts slowly."""

    missing_s = 0.0

    def __init__(self, start: Callable[[], Any], restart: object, *, spare: bool) -> None:
        (order,) = start.args
        self.models = order.load()
        self.catalog = self.models.catalog

    def run(
        self, name: str, degree: int, images: list[torch.Tensor], limit_s: float | None = None
    ) -> list[torch.Tensor]:
        return list(self.models.run(name, degree, torch.stack(images)))

    def view(self, name: str, degree: int, image: torch.Tensor) -> TokensViewed:
        return TokensViewed(*self.models.view(name, degree, image))

    def close(self) -> None:
        pass


@functools.cache
def decoders() -> DecoderPool:
    """Those of all servers of a test process: each pool loads the libraries anew."""
    # They are sent what is defined here. It stays: those that tests kill are start_engine again.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    pool = DecoderPool(check_settings({}))
    atexit.register(pool.close)
    return pool


@contextmanager
def serving(runs: Mapping[str, Run], *, apart: bool = False, **told: Any) -> Iterator[Serving]:
    """A server that ends with the block; its models are in a process of their own, or near."""
    settings = check_settings(PATIENT | told)
    listener = bind_socket(settings)
    folders = {name: run.folder for name, run in runs.items()}
    if apart:
        served, engine, settings = start_engine(folders, settings)
    else:
        with mock.patch.object(served_runs_module, "Supervisor", InProcessSupervisor):
            served, engine, settings = start_engine(folders, settings)
    ready = threading.Event()
    server = Server(
        create_app(engine, served.supervisor, settings, decoders()),
        engine,
        settings,
        ready=ready.set,
        reload=lambda: served.reload(engine.call_between_batches),
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    ready.wait()
    try:
        yield Serving(listener.getsockname()[1], engine, served, server, thread)
    finally:
        if thread.is_alive():
            server.handle_exit(signal.SIGTERM, None)
        thread.join()
        served.close()


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """An image of its own, width and height given."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def form(*images: bytes, name: str = "images") -> tuple[bytes, str]:
    """A form with files, and its Content-Type."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{i}"\r\n\r\n'.encode()
        + image
        + b"\r\n"
        for i, image in enumerate(images)
    ]
    return b"".join([*parts, b"--x--\r\n"]), "multipart/form-data; boundary=x"


def text(*images: bytes, **options: Any) -> tuple[bytes, str]:
    """A request as JSON, and its Content-Type."""
    coded = [b64encode(image).decode() for image in images]
    return json.dumps({"images": coded} | options).encode(), "application/json"


def until(happened: Callable[[], object]) -> None:
    """Wait for what a server does; an error if it takes a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))
