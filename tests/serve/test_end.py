"""The end of a server: what has come is answered, what comes is refused."""

import asyncio
import select
import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from serving import everything, file, picture, serving, until

from tokendial.serve.http.server import Server
from tokendial.serve.settings import check_settings


def test_accepted_requests_are_answered_and_new_ones_refused(pets):
    image = file(picture())
    with serving({"pets": pets}) as server, ExitStack() as closing:
        with server.busy():
            queued = closing.enter_context(server.begin(image, len(image)))
            until(lambda: server.engine.status().queued == 1)
            begun = closing.enter_context(server.begin(image[:-10], len(image)))
            server.server.handle_exit(signal.SIGTERM, None)
            until(lambda: server.ask("/readyz").status == 503)
            reply = server.predict(image)
            assert (reply.status, reply.error["code"]) == (503, "draining")
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["connection"] == "close"
            assert server.ask("/healthz").status == 200
            begun.sendall(image[-10:])
            until(lambda: server.engine.status().queued == 2)
        for connection in (queued, begun):
            assert everything(connection).startswith(b"HTTP/1.1 200 ")
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert not server.engine.alive


def test_a_second_signal_ends_it_at_once(pets):
    with serving({"pets": pets}) as server, ExitStack() as closing:
        with server.busy():
            connection = closing.enter_context(server.begin(b"1", 9))
            for _ in range(2):
                server.server.handle_exit(signal.SIGTERM, None)
            server.thread.join(60)
            assert not server.thread.is_alive()
        assert b"200" not in everything(connection)


def test_the_end_comes_whatever_clients_do(pets):
    pages = 500 * b"GET /page/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving({"pets": pets}, timeout_s=4) as server, ExitStack() as closing:
        closing.enter_context(server.connect())
        unread = closing.enter_context(server.connect(pages))
        closing.enter_context(server.begin(b"1", 9))
        until(lambda: select.select([unread], [], [], 0)[0])  # the pages that nobody reads
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_requests_that_are_never_answered_do_not_delay_the_end():
    """It would hang, and fail, if the server waited for every request."""
    drained: list[float] = []
    engine = SimpleNamespace(drain=lambda timeout_s: drained.append(timeout_s) or False)
    settings = check_settings({"timeout_s": 0.2})
    server = Server(FastAPI(), engine, settings, ready=lambda: None, reload=lambda: None)

    async def drain() -> None:
        server.server_state.tasks = {asyncio.ensure_future(asyncio.Event().wait())}
        await asyncio.wait_for(server._drain(), 60)

    asyncio.run(drain())
    assert server.should_exit
    assert drained == [pytest.approx(0, abs=0.1)]
