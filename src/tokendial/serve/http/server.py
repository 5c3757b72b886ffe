"""The HTTP server: uvicorn with time limits for slow clients and an orderly end.

SIGTERM and SIGINT: accepted requests are answered, new ones are refused, and the process ends with
code 0. SIGHUP: runs that have changed on disk are loaded again.
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
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokendial.errors import error_message
from tokendial.serve.http.admission import (
    MAX_HEAD_BYTES,
    PREDICTION_PREFIX,
    AdmissionMiddleware,
    closing_response,
)
from tokendial.serve.scheduling.engine import Engine
from tokendial.serve.settings import Settings

_log = logging.getLogger(__name__)
_END_RESERVE_S = 2.0
"""Seconds, out of the time to stop, that are kept for what follows the last answer."""
_READ_SLICE_S = 0.002
"""Longest time for which data of one connection is parsed before other connections' turn."""
_FIRST_PIECE_BYTES = 512
"""Bytes that are parsed between two looks at the clock: fewer than a hundred HTTP chunks."""
_PIPELINED_DELAY_S = 0.05
"""Delay of a request that was sent before the last one was answered. Browsers do not do that."""
_BACKLOG = 128
"""Number of connections that the system holds until they are accepted."""
UNPROTECTED_WARNING = "anyone who reaches {} may use this server: there are no API keys."
"""Warning for `is_unprotected`, with the host."""


def bind_socket(settings: Settings) -> socket.socket:
    """Bind the address to listen on, without listening yet; raise an OSError if it is taken."""
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


def server_url(listener: socket.socket) -> str:
    """Address of the server for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_unprotected(listener: socket.socket, settings: Settings) -> bool:
    """Whether other machines can reach the server and it asks for no API key."""
    return not (settings.api_keys or ip_address(listener.getsockname()[0]).is_loopback)


class Server(uvicorn.Server):
    """Serves an application until a signal ends it."""

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: Settings,
        *,
        ready: Callable[[], None],
        reload: Callable[[], object],
    ) -> None:
        """Create a server; `run(sockets=[listener])` runs it.

        Args:
            app: Application of `create_app`.
            engine: The running engine; the server drains it at the end.
            settings: The limits.
            ready: Called when the server accepts requests.
            reload: Called in a thread after SIGHUP. Its errors are logged.
        """
        self._admission = AdmissionMiddleware(app, settings.max_connections)
        super().__init__(
            uvicorn.Config(
                self._admission,
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                http=limited_protocol(settings.timeout_s, 2 * settings.max_connections),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # `_drain` has waited for all answers before uvicorn begins to stop.
                timeout_graceful_shutdown=1,
            )
        )
        self._engine, self._settings = engine, settings
        self._ready, self._reload = ready, reload
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading = self._reload_again = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and call `ready`."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        # Only the main thread can set signal handlers; uvicorn does the same for its own.
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._start_task, self._reload_runs)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at the second signal, stop at once."""
        if self._loop is None or self._admission.closed:
            self.should_exit = self.force_exit = True
            return
        # Uvicorn stops listening first, so clients would get no answer. Here they get a 503 until
        # the last accepted request is answered.
        self._admission.closed = True
        self._loop.call_soon_threadsafe(self._start_task, self._drain)

    def _start_task(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        # `timeout_s` covers everything, also the end of uvicorn and of the model processes.
        timeout_s = max(self._settings.timeout_s - _END_RESERVE_S, self._settings.timeout_s / 2)
        until = time.monotonic() + timeout_s
        if answering := set(self.server_state.tasks):
            await asyncio.wait(answering, timeout=timeout_s)
        left_s = max(0.0, until - time.monotonic())
        if not await asyncio.to_thread(self._engine.drain, left_s):
            _log.error("some requests were still unanswered after %g seconds", timeout_s)
        self.should_exit = True

    async def _reload_runs(self) -> None:
        """Reload, one reload at a time; all signals during one lead to one more afterwards."""
        self._reload_again = True
        if self._reloading:
            return
        self._reloading = True
        while self._reload_again:
            self._reload_again = False
            try:
                await asyncio.to_thread(self._reload)
            except Exception as error:
                _log.error(
                    "the runs could not be reloaded, the old models stay in use: %s",
                    error_message(error),
                )
        self._reloading = False


def limited_protocol(timeout_s: float, max_connections: int) -> type[H11Protocol]:
    """Uvicorn's HTTP/1.1 with limits of time and number for connections.

    One timer of a connection runs while no request is being answered. It ends connections that
    send nothing, whose headers arrive slowly, or that go on sending after a refusal. A second timer
    runs while the client does not read what it was sent. In between, the application has limits
    of its own.

    Args:
        timeout_s: Seconds of both timers.
        max_connections: Maximum number of connections. One more closes the oldest connection that
            does not wait for a prediction.
    """
    connections: dict[H11Protocol, None] = {}
    """Open connections; the one whose last request is longest ago comes first."""

    class LimitedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _unread = b""
        """Data that was received and not parsed yet."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections[self] = None
            self._start_timer()
            if len(connections) > max_connections:
                idle = (each for each in connections if not _awaits_prediction(each))
                oldest = next(idle)  # at the latest the new one
                del connections[oldest]
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            if self._unread:
                self._unread += data
                self.transport.pause_reading()
            else:
                self._parse(data)

        def on_response_complete(self) -> None:
            if self in connections:
                connections[self] = connections.pop(self)
            self._start_timer()
            pipelined, _ = self.conn.trailing_data
            if pipelined:
                self.loop.call_later(_PIPELINED_DELAY_S, self._complete_response)
            else:
                self._complete_response()

        def _complete_response(self) -> None:
            super().on_response_complete()
            if not self.cycle.response_complete:  # the next request was there already
                self._stop_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.pop(self, None)
            self._unread = b""
            self._stop_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()  # a response has begun
                return
            response = closing_response(400, "broken_request", "This is not HTTP/1.1.")
            head = h11.Response(
                status_code=400, headers=response.raw_headers, reason=b"Bad Request"
            )
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self._start_timer()
            self.transport.close()

        def _parse(self, data: bytes) -> None:
            """Parse data for at most `_READ_SLICE_S`, then let other connections have their turn.

            A request may consist of thousands of tiny chunks, which would block the event loop.
            Each piece is as large as all before it, so it takes about as long as those; parsing
            stops when the next piece would exceed the time.
            """
            # The clock of uvloop does not advance while a callback runs.
            began, at, piece = time.monotonic(), 0, _FIRST_PIECE_BYTES
            while at < len(data) and not self.transport.is_closing():
                super().data_received(data[at : at + piece])
                at += piece
                piece = at
                if at < len(data) and 2 * (time.monotonic() - began) > _READ_SLICE_S:
                    self._unread = data[at:]
                    self.transport.pause_reading()
                    self.loop.call_soon(self._parse_unread)
                    break
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()

        def _parse_unread(self) -> None:
            if self.transport.is_closing():
                return
            data, self._unread = self._unread, b""
            if not self.flow.read_paused:
                self.transport.resume_reading()
            self._parse(data)

        def _start_timer(self) -> None:
            self._stop_timer()
            self._timer = self.loop.call_later(timeout_s, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return LimitedProtocol


def _awaits_prediction(connection: H11Protocol) -> bool:
    cycle = connection.cycle
    running = cycle is not None and not cycle.response_complete
    return running and cycle.scope["path"].startswith(PREDICTION_PREFIX)
