"""Requests that cost a server more than they cost the client that sends them."""

import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

_TIMEOUT_S = 60.0
_PIXELS = (7070, 7070)  # just under the 50 million that are taken by default


@dataclass(frozen=True, slots=True)
class Attack:
    """A request that several clients send again and again."""

    name: str
    sent: Callable[[], bytes]
    """Bytes that one connection sends."""
    clients: int = 4
    """Number of concurrent connections."""
    reads: bool = True
    """Whether clients wait for answers; if not, connections stay open and nothing is read."""

    def run(self, address: tuple[str, int], seconds: float) -> Counter[str]:
        """Send the request for some seconds; count the answers by status."""
        sent, until = self.sent(), time.monotonic() + seconds
        found: Counter[str] = Counter()

        def client() -> None:
            while time.monotonic() < until:
                try:
                    with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
                        found[self._status(connection, sent, until)] += 1
                except OSError:
                    found["closed"] += 1
                    time.sleep(0.01)  # the server has had enough

        threads = [threading.Thread(target=client) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _status(self, connection: socket.socket, sent: bytes, until: float) -> str:
        if not self.reads:
            connection.settimeout(max(0.01, until - time.monotonic()))
            connection.sendall(sent)
            time.sleep(max(0.0, min(1.0, until - time.monotonic())))
            return "not read"
        # A server may answer before it has read everything.
        threading.Thread(target=_send, args=(connection, sent)).start()
        answer = connection.recv(4096)
        return answer.split(b" ", 2)[1].decode() if answer else "closed"


def _send(connection: socket.socket, sent: bytes) -> None:
    with suppress(OSError):  # it was refused before
        connection.sendall(sent)


def request(body: bytes, kind: str, query: str = "") -> bytes:
    """The bytes of a prediction request."""
    head = (
        f"POST /v1/predict{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _json(body: bytes) -> Callable[[], bytes]:
    return lambda: request(body, "application/json")


def _file(image: Callable[[], Image.Image], kind: str, **options: object) -> Callable[[], bytes]:
    def made() -> bytes:
        file = io.BytesIO()
        image().save(file, kind, **options)
        return request(file.getvalue(), f"image/{kind.lower()}", _LONG)

    return made


def _many_images() -> bytes:
    file = io.BytesIO()
    Image.new("1", _PIXELS).save(file, "PNG", optimize=True)
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="i"\r\n\r\n'
    body = 32 * (part + file.getvalue() + b"\r\n") + b"--x--\r\n"
    return request(body, "multipart/form-data; boundary=x", _LONG)


def _comments() -> bytes:
    file = io.BytesIO()
    Image.new("P", (1, 1)).save(file, "GIF")
    whole = file.getvalue()
    at = 13 + (3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 128 else 0)
    comment = b"\x21\xfe" + 40_000 * (b"\xff" + 255 * b"x") + b"\x00"
    return request(whole[:at] + comment + whole[at:], "image/gif", _LONG)


def _parts() -> bytes:
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="i"\r\n'
    head = b"".join(b"X-%d: %b\r\n" % (i, 4000 * b"y") for i in range(6))
    body = 32 * (part + head + b"\r\nx\r\n") + b"--x--\r\n"
    return request(body, "multipart/form-data; boundary=x")


def _chunks() -> bytes:
    head = request(b"", "image/png").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + 200_000 * b"1\r\nx\r\n" + b"0\r\n\r\n"


_LONG = "?deadline_ms=30000"
_MB = 1_000_000
_PAGES = 2000 * b"GET /page/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
_SLOW = request(bytes(9), "image/png")[:-8]
ATTACKS = (
    Attack("nothing", bytes, clients=0),
    Attack("10 MB of numbers in JSON", _json(b'{"images": [' + 5 * _MB * b"1," + b"1]}")),
    Attack("10 MB of lists in lists", _json(b'{"images": ' + 5 * _MB * b"[" + 5 * _MB * b"]}")),
    Attack(
        "8 MB of unknown names",
        _json(b"{" + b",".join(b'"%d": 1' % i for i in range(700_000)) + b"}"),
    ),
    Attack("10 MB of base64", _json(b'{"images": ["' + 10 * _MB * b"A" + b'"]}')),
    Attack("15,000 query parameters", lambda: request(b"x", "image/png", "?" + 15_000 * "a&")),
    Attack("long heads in a form", _parts),
    Attack("200,000 chunks of a byte", _chunks),
    Attack("PNG of 4 x 400,000 pixels", _file(lambda: Image.new("L", (4, 400_000)), "PNG")),
    Attack("32 PNGs of 50 megapixels", _many_images),
    Attack("PNG of 50 megapixels, 16 bit", _file(lambda: Image.new("I;16", _PIXELS), "PNG")),
    Attack(
        "WebP of 50 megapixels",
        _file(lambda: Image.new("RGB", _PIXELS), "WEBP", lossless=True, method=0),
    ),
    Attack("GIF with comments of 10 MB", _comments),
    Attack("pages that are never read", lambda: _PAGES, clients=60, reads=False),
    Attack("600 connections without a word", bytes, clients=600, reads=False),
    Attack("100 bodies that do not come", lambda: _SLOW, clients=100),
)
