"""One process that serves: uvicorn, with patience for clients and an orderly end.

SIGTERM and SIGINT: what has come is answered, what comes is refused, the process ends with 0.
SIGHUP: runs are read anew.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokendial.errors import one_line
from tokendial.serve.engine import Engine
from tokendial.serve.problems import failure, retry_after
from tokendial.serve.schemas import Problem
from tokendial.serve.settings import Settings

_log = logging.getLogger(__name__)
# Uvicorn bounds a head only while a part of it is missing.
_MOST_HEAD_BYTES, _HEADER_BYTES = 32_768, 32
_ALWAYS_OPEN = ("/healthz", "/metrics")


def bound_socket(settings: Settings) -> socket.socket:
    """The address to listen at, taken but not yet listened at; an OSError if it is not free."""
    family, kind, _, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM
    )[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """Where browsers find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def exposed(listener: socket.socket, settings: Settings) -> bool:
    """Whether other machines reach the server, and nobody has to bring a key."""
    return not (settings.api_keys or ip_address(listener.getsockname()[0]).is_loopback)


class Server(uvicorn.Server):
    """Serves an application until it is told to end."""

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: Settings,
        *,
        ready: Callable[[], None],
        reload: Callable[[], object],
    ) -> None:
        """Make a server; `run(sockets=[listener])` runs it.

        Args:
            app: Of `create_app`.
            engine: Runs already; the server drains it.
            settings: The limits.
            ready: Called when requests can come.
            reload: What SIGHUP is for; called in a thread. Its ValueErrors and OSErrors are logged.
        """
        self._door = _Door(
            app, settings.max_connections, lambda: len(self.server_state.connections)
        )
        super().__init__(
            uvicorn.Config(
                self._door,
                http=_patient(settings.timeout_s),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Whoever is still there then was waited for already.
                timeout_graceful_shutdown=1,
            )
        )
        self._engine, self._settings = engine, settings
        self._ready, self._reload = ready, reload
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = self._read_again = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():  # as for uvicorn's signals
            self._loop.add_signal_handler(signal.SIGHUP, self._begin, self._read_anew)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the second time, end at once."""
        if self._loop is None or self._door.closed:
            self.should_exit = self.force_exit = True
            return
        # Uvicorn would stop to listen first, so that new requests would find nobody.
        self._door.closed = True
        self._loop.call_soon_threadsafe(self._begin, self._end)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        timeout_s = self._settings.timeout_s
        if answering := set(self.server_state.tasks):
            await asyncio.wait(answering, timeout=timeout_s)
        if not await asyncio.to_thread(self._engine.drain, timeout_s):
            _log.error("requests were left unanswered after %g seconds", timeout_s)
        self.should_exit = True

    async def _read_anew(self) -> None:
        """One reading at a time; signals that come meanwhile are one more of them."""
        self._read_again = True
        if self._reading:
            return
        self._reading = True
        while self._read_again:
            self._read_again = False
            try:
                await asyncio.to_thread(self._reload)
            except Exception as error:
                _log.error("not reloaded, the old models go on: %s", one_line(error))
        self._reading = False


class _Door:
    """Refuses what comes at the end, from too many connections, or with too many headers."""

    def __init__(self, app: ASGIApp, most: int, connected: Callable[[], int]) -> None:
        self._app, self._most, self._connected = app, most, connected
        self.closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._refusal(scope) if scope["type"] == "http" else None
        await (answer or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        head = len(scope["raw_path"]) + len(scope["query_string"])
        head += sum(len(name) + len(value) + _HEADER_BYTES for name, value in scope["headers"])
        if head > _MOST_HEAD_BYTES:
            return _refused(431, "head_too_large", "The headers are too long.")
        if scope["path"] in _ALWAYS_OPEN:
            return None
        if self.closed:
            return _refused(503, "draining", "The server is stopping.")
        if self._connected() > self._most:
            message = f"At most {self._most} connections are open at a time."
            return _refused(503, "busy", message)
        return None


def _refused(status: int, code: str, message: str) -> ASGIApp:
    headers = {"connection": "close"} | (retry_after(1.0) if status == 503 else {})
    return failure(status, Problem(code=code, message=message, field=None), headers)


def _patient(timeout_s: float) -> type[H11Protocol]:
    """HTTP/1.1 as uvicorn speaks it, for clients that send a head, or take an answer, in time.

    What is between, the application times. It is one timer for a connection that sends nothing, one
    whose headers drip in, one that goes on sending what was refused, and one that does not read.
    """

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # else the next request was there already
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(timeout_s, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Patient
