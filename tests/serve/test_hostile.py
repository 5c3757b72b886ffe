"""Requests that are made to cost much: none holds up the event loop, nor others for long."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import uvicorn
from PIL import Image
from serving import decoders, file, picture, serving, text, until
from slow_transform import wait_if_large
from uvicorn.server import ServerState

from benchmarks import hostile
from benchmarks.attacks import ATTACKS
from benchmarks.server import Server
from tokendial.serve.http import uploads
from tokendial.serve.http.server import limited_protocol
from tokendial.serve.workers.decoder import decode_base64

JSON = "application/json"
MB = 1_000_000


@pytest.fixture(scope="module")
def server(pets):
    with serving({"pets": pets}, timeout_s=120) as running:
        running.predict(file(picture()))  # the decoders have loaded their libraries
        yield running


BODIES = {
    "numbers": b'{"images": [' + MB * b"1," + b"1]}",
    "numbers that are few enough to be looked at": b'{"images": [' + 900 * b"1," + b"1]}",
    "lists in lists": b'{"images": ' + MB * b"[" + MB * b"]" + b"}",
    "unknown names": b"{" + b",".join(b'"%d":1' % i for i in range(MB // 4)) + b"}",
    "empty texts": b'{"images": [' + MB * b'"",' + b'""]}',
    "quotes": b'{"images": ["' + MB * b'\\"' + b'"]}',
    "backslashes": b'{"images": ["' + MB * b"\\" + b'"]}',
    "blanks": 2 * MB * b" ",
    "a long name": b'{"' + MB * b"x" + b'": 1}',
    "half of a letter": b'{"images": ["x"], "\\ud800": 1}',
}


@pytest.mark.parametrize("name", BODIES)
def test_json_is_refused_before_its_values_are_made(server, monkeypatch, name):
    """Nothing but a short rest of the body is parsed. What is parsed is counted, not timed."""
    parsed: list[int] = []

    def loads(text: bytes) -> object:
        parsed.append(len(text))
        return json.loads(text)

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "json", SimpleNamespace(loads=loads))
        reply = server.ask("/v1/predict", BODIES[name], JSON)
    assert 400 <= reply.status < 500
    assert sum(parsed) < 20_000


def test_many_query_parameters_are_refused(server):
    reply = server.ask("/v1/degrees?" + 15_000 * "a&")
    assert (reply.status, reply.error["code"]) == (422, "invalid")


def test_text_of_images_is_read_as_json_writes_it(server):
    body, kind = text(file(picture()))
    images = json.loads(body)["images"][0]
    assert "/" in images
    escaped = body.replace(b"/", b"\\/").replace(b"A", b"\\u0041")
    answer = server.ask("/v1/predict", body, kind).json["predictions"][0]["classes"]
    assert server.ask("/v1/predict", escaped, kind).json["predictions"][0]["classes"] == answer
    assert decode_base64(escaped.split(b'"')[3], "it") == file(picture())


class Wire(asyncio.Transport):
    """The connection of one client, in memory."""

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


def test_tiny_chunks_leave_others_their_turn():
    """The event loop turns many times while the chunks that arrive together are read.

    Catches a reader that goes through all of them at once: the loop would then turn once or twice.
    Counting turns of a loop that does nothing else says the same on every machine.
    """
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = asyncio.Event()

    async def application(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        body.set()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def turns_of_the_loop() -> int:
        config = uvicorn.Config(application, http=limited_protocol(timeout_s=60, max_connections=9))
        config.load()
        protocol = config.http_protocol_class(config, ServerState(), {})
        protocol.connection_made(Wire())
        protocol.data_received(head + 40_000 * b"1\r\nx\r\n" + b"0\r\n\r\n")
        turns = 0
        while not body.is_set():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(turns_of_the_loop()) >= 6


def gif_with_comments(size: int) -> bytes:
    """Pillow puts comments together in a time that grows with the square of their size."""
    whole = file(Image.new("P", (1, 1)), "GIF")
    at = 13 + 3 * 2 ** ((whole[10] & 7) + 1) * (whole[10] >> 7)
    comment = b"\x21\xfe" + (size // 256) * (b"\xff" + 255 * b"x") + b"\x00"
    return whole[:at] + comment + whole[at:]


def narrow(width: int, height: int) -> bytes:
    """A PNG in some hundred bytes."""
    return file(Image.new("L", (width, height)), compress_level=9)


@pytest.mark.parametrize(("width", "height"), [(4, 400_000), (400_000, 4), (1, 1_000_000)])
def test_narrow_images_are_answered(server, width, height):
    assert server.predict(narrow(width, height)).status == 200


def test_images_that_take_too_long_to_open_are_given_up(pets):
    bombs = 3 * [gif_with_comments(9 * MB)]
    with serving({"pets": pets}, max_decode_s=0.5, timeout_s=600) as server:
        with ThreadPoolExecutor(3) as pool:
            query = "?deadline_ms=600000"
            asked = [pool.submit(server.predict, bomb, query=query) for bomb in bombs]
        for each in asked:
            reply = each.result()
            assert (reply.status, reply.error["code"]) == (413, "too_costly")
            assert reply.error["field"] == "images[0]"
        assert server.predict(file(picture())).status == 200


def test_large_images_leave_one_decoder_to_others(pets, tmp_path):
    """Large images are held in their decoders until a small one is answered.

    It would hang, and fail, if every decoder took large images.
    """
    large = file(Image.new("RGB", (1200, 1000)))
    with serving({"pets": pets}) as server, ThreadPoolExecutor(3) as pool:
        models = server.served.supervisor.catalog.models
        waiting = partial(wait_if_large, tmp_path / "go", models["pets"].transform)
        models["pets"] = replace(models["pets"], transform=waiting)
        asked = [pool.submit(server.predict, large) for _ in range(3)]
        until(lambda: decoders().ahead == 0 and len(list(tmp_path.glob("held-*"))) == 2)
        assert server.predict(file(picture())).status == 200
        assert not any(each.done() for each in asked)
        (tmp_path / "go").touch()
        assert [each.result().status for each in asked] == [200] * 3


@pytest.mark.parametrize("with_their_parent", [False, True])
def test_killed_decoders_are_replaced(server, with_their_parent):
    parent = server.decoders
    killed = [*parent.children(), *[parent][:with_their_parent]]
    for each in reversed(killed):
        each.kill()
    gone, _ = psutil.wait_procs(killed, timeout=60)
    assert len(gone) == len(killed)
    assert server.predict(file(picture())).status == 200


def test_the_hostile_benchmark_measures_honest_clients(server, monkeypatch):
    monkeypatch.setattr(hostile, "_SETTLE_S", 1.1)
    attack = next(each for each in ATTACKS if "numbers" in each.name)
    body, _ = text(file(picture()))
    row = hostile.measure_attack(
        Server(f"http://127.0.0.1:{server.port}", os.getpid()), attack, body, 1
    )
    assert set(row["answers"].split()) >= {"x", "413"}
    assert row["honest"] >= 1
    assert row["lost"] == 0
    assert row["alive"]
    assert row["loop_ms"] > 0
    assert row["honest_ms"] > 0


def test_every_attack_is_a_request(server):
    for attack in ATTACKS:
        first = attack.sent().partition(b"\r\n")[0]
        assert first == b"" or first.endswith(b" HTTP/1.1"), attack.name
