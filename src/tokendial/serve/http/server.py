"""One process that serves: uvicorn, with patience for clients and an orderly end.

SIGTERM and SIGINT: what has come is answered, what comes is refused, the process ends with 0.
SIGHUP: runs are read anew.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokendial.errors import error_message
from tokendial.serve.http.problems import failure, retry_after
from tokendial.serve.http.schemas import Problem
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.settings import Settings

_log = logging.getLogger(__name__)
# Uvicorn bounds a head only while a part of it is missing, and not what its parts take in memory.
_MOST_HEAD_BYTES, _HEADER_BYTES = 32_768, 32
_ALWAYS_OPEN = ("/healthz", "/metrics")
_LIMITED = "/v1/"
"""Where requests take time and memory; all else is answered at once."""
_LAST_S = 2.0
"""Of the time to end: for what comes after the last answer."""
_TURN_S = 0.002
"""How long what one connection has sent is read before others have their turn."""
_PIECE = 512
"""Bytes that are read without a look at the clock: less than a hundred of the smallest events."""
_PIPELINED_S = 0.05
"""Until a request is looked at that was sent before the last one was answered; no browser does."""
_BACKLOG = 128
"""Connections that are taken at a time."""


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
        self._door = _Door(app, settings.max_connections)
        super().__init__(
            uvicorn.Config(
                self._door,
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
                http=patient_protocol(settings.timeout_s, 2 * settings.max_connections),
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
        # One promise for all that follows; the last part is uvicorn's, and that of the models.
        timeout_s = max(self._settings.timeout_s - _LAST_S, self._settings.timeout_s / 2)
        until = time.monotonic() + timeout_s
        if answering := set(self.server_state.tasks):
            await asyncio.wait(answering, timeout=timeout_s)
        left_s = max(0.0, until - time.monotonic())
        if not await asyncio.to_thread(self._engine.drain, left_s):
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
                _log.error("not reloaded, the old models go on: %s", error_message(error))
        self._reading = False


class _Door:
    """Refuses what comes at the end, is too much at a time, or has too many headers."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._inside = app, most, 0
        self.closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counts = scope["path"].startswith(_LIMITED)
        if answer := self._refusal(scope, counts):
            await answer(scope, receive, send)
            return
        self._inside += counts
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= counts

    def _refusal(self, scope: Scope, counts: bool) -> ASGIApp | None:
        head = len(scope["raw_path"]) + len(scope["query_string"])
        head += sum(len(name) + len(value) + _HEADER_BYTES for name, value in scope["headers"])
        if head > _MOST_HEAD_BYTES:
            return _refused(431, "head_too_large", "The headers are too long.")
        if scope["path"] in _ALWAYS_OPEN:
            return None
        if self.closed:
            return _refused(503, "draining", "The server is stopping.")
        if counts and self._inside >= self._most:
            message = f"At most {self._most} requests are taken at a time."
            return _refused(503, "busy", message)
        return None


def _refused(status: int, code: str, message: str) -> JSONResponse:
    headers = {"connection": "close"} | (retry_after(1.0) if status == 503 else {})
    return failure(status, Problem(code=code, message=message, field=None), headers)


def _asks_for_a_prediction(connection: H11Protocol) -> bool:
    cycle = connection.cycle
    going = cycle is not None and not cycle.response_complete
    return going and cycle.scope["path"].startswith(_LIMITED)


def patient_protocol(timeout_s: float, most: int) -> type[H11Protocol]:
    """HTTP/1.1 as uvicorn speaks it, for clients that send a head, or take an answer, in time.

    What is between, the application times. It is one timer for a connection that sends nothing, one
    whose headers drip in, and one that goes on sending what was refused; and another one for a
    connection that does not read what it was sent.

    Args:
        timeout_s: Seconds for either.
        most: Connections at a time. For one more, the oldest without a prediction is closed.
    """
    connections: dict[H11Protocol, None] = {}  # those that have asked least lately come first

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _unread = b""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections[self] = None
            self._wait()
            if len(connections) > most:
                idle = (each for each in connections if not _asks_for_a_prediction(each))
                oldest = next(idle)  # the new one at the latest
                del connections[oldest]
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            if self._unread:  # what came before has not had its turn
                self._unread += data
                self.transport.pause_reading()
            else:
                self._read(data)

        def on_response_complete(self) -> None:
            if self in connections:
                connections[self] = connections.pop(self)
            self._wait()
            pipelined, _ = self.conn.trailing_data
            if pipelined:
                self.loop.call_later(_PIPELINED_S, self._go_on)
            else:
                self._go_on()

        def _go_on(self) -> None:
            super().on_response_complete()
            if not self.cycle.response_complete:  # the next request was there already
                self._stop_waiting()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.pop(self, None)
            self._unread = b""
            self._stop_waiting()
            self._stop_write_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()  # an answer has begun
                return
            answer = _refused(400, "broken_request", "This is not HTTP/1.1.")
            head = h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self._wait()  # to be read
            self.transport.close()

        def _read(self, data: bytes) -> None:
            """Read for a while: thousands of the smallest pieces would hold everybody up.

            Each piece is as large as all before it, so it takes about as long as those.
            """
            began, at, piece = time.monotonic(), 0, _PIECE  # the loop's own clock stands still
            while at < len(data) and not self.transport.is_closing():
                super().data_received(data[at : at + piece])
                at += piece
                piece = at
                if at < len(data) and 2 * (time.monotonic() - began) > _TURN_S:
                    self._unread = data[at:]
                    self.transport.pause_reading()
                    self.loop.call_soon(self._read_on)
                    break
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def _read_on(self) -> None:
            if self.transport.is_closing():
                return
            data, self._unread = self._unread, b""
            if not self.flow.read_paused:
                self.transport.resume_reading()
            self._read(data)

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(timeout_s, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return Patient
