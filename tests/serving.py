"""A real server in a thread of the tests, and helpers to send requests to it."""

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
from concurrent.futures import Future
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
from tokendial.serve.workers.messages import BatchLogits, ImageToEmbed, TokensViewed
from tokendial.serve.workers.model_process import choose_outputs
from tokendial.serve.workers.served_runs import ServedRuns

# Settings for a busy machine: no test is about time.
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
        """Send a request over a new connection."""
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
        """Ask for a prediction of images, sent as a form."""
        return self.ask(f"/v1/predict{query}", *form(*images))

    def connect(self, text: bytes = b"") -> socket.socket:
        """Open a connection and send some bytes over it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(text)
        return connection

    def begin(self, body: bytes, image_bytes: int) -> socket.socket:
        """Send the head of a request to predict a PNG file, and some of the file, not all of it.

        Returns once the request has been accepted: a server asks for the body only then.
        """
        head = (
            "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            f"Content-Type: image/png\r\nContent-Length: {image_bytes}\r\n\r\n"
        )
        connection = self.connect(head.encode())
        asked = b""
        while not asked.endswith(b"\r\n\r\n"):
            asked += connection.recv(1)
        assert asked.startswith(b"HTTP/1.1 100 "), asked
        connection.sendall(body)
        return connection

    @property
    def decoders(self) -> psutil.Process:
        """The process that forks decoders."""
        return psutil.Process(decoders()._process.pid)

    def lag_s(self) -> float:
        """Longest delay of the event loop in the last minute."""
        lines = self.ask("/metrics").body.decode().splitlines()
        (line,) = (line for line in lines if line.startswith("tokendial_event_loop_lag_seconds "))
        return float(line.split()[1])

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the engine from running batches inside the block."""
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

    def __init__(self, start: Callable[[], Any], restart: object) -> None:
        (order,) = start.args
        self.models = order.load()
        self.catalog = self.models.catalog

    def run(
        self,
        name: str,
        degree: int,
        images: list[torch.Tensor | ImageToEmbed],
        limit_s: float | None = None,
    ) -> list[torch.Tensor]:
        wanted = [isinstance(image, ImageToEmbed) for image in images]
        batch = torch.stack([getattr(image, "tensor", image) for image in images])
        if not any(wanted):
            return list(self.models.run(name, degree, batch))
        found = self.models.run_with_embeddings(name, degree, batch)
        return choose_outputs(wanted, BatchLogits(*(each.numpy() for each in found)))

    def view(self, name: str, degree: int, image: torch.Tensor) -> TokensViewed:
        return TokensViewed(*self.models.view(name, degree, image))

    def close(self) -> None:
        pass


@functools.cache
def decoders() -> DecoderPool:
    """The decoders of all servers of a test process; starting a pool takes seconds."""
    # Decoders load functions of this folder that tests send them. The variable stays set, because
    # decoders that tests kill are started again.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    pool = DecoderPool(check_settings({}))
    atexit.register(pool.close)
    return pool


@contextmanager
def serving(
    runs: Mapping[str, Run], *, own_process: bool = False, **options: Any
) -> Iterator[Serving]:
    """Run a server that ends with the block.

    Its models run in a process of their own, or in that of the tests, which is quicker to start.
    """
    settings = check_settings(PATIENT | options)
    listener = bind_socket(settings)
    folders = {name: run.folder for name, run in runs.items()}
    kind = served_runs_module.Supervisor if own_process else InProcessSupervisor
    try:
        with mock.patch.object(served_runs_module, "Supervisor", kind):
            served, engine, settings = start_engine(folders, settings)
    except BaseException:
        listener.close()
        raise
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
    """A random image; `size` is its width and height."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def form(*images: bytes, name: str = "images") -> tuple[bytes, str]:
    """Encode files as a form; return it and its Content-Type."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{i}"\r\n\r\n'.encode()
        + image
        + b"\r\n"
        for i, image in enumerate(images)
    ]
    return b"".join([*parts, b"--x--\r\n"]), "multipart/form-data; boundary=x"


def text(*images: bytes, **options: Any) -> tuple[bytes, str]:
    """Encode files and options as JSON; return it and its Content-Type."""
    coded = [b64encode(image).decode() for image in images]
    return json.dumps({"images": coded} | options).encode(), "application/json"


def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened; fail after a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def at_once(work) -> Future:
    """What an engine that has nothing else to do makes of a call."""
    future = Future()
    future.set_result(work())
    return future


def everything(connection: socket.socket) -> bytes:
    """Read from a connection until the server closes it."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))
