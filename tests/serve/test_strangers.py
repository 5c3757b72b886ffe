"""Requests of other sites' pages, broken HTTP, and clients without a key."""

import json
import os

import pytest
from serving import everything, file, picture, serving

from tokendial.serve.settings import readable_by_others

PNG = "image/png"


@pytest.fixture(scope="module")
def server(pets):
    with serving({"pets": pets}, allowed_hosts=("Example.org",), api_keys=("key",)) as running:
        yield running


KEY = {"x-api-key": "key"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.0.2.1", "example.org"]
)
def test_the_names_of_the_server_are_known(server, host):
    assert server.ask("/v1/models", host=host, **KEY).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "example.org.x", ""])
def test_other_names_are_refused_but_for_probes(server, host):
    for path in ("/v1/models", "/", "/openapi.json", "/metrics"):
        reply = server.ask(path, host=host, **KEY)
        assert (reply.status, reply.error["code"]) == (421, "unknown_host")
    assert server.ask("/healthz", host=host).status == 200


def test_any_name_may_be_allowed(pets):
    with serving({"pets": pets}, allowed_hosts=("*",)) as server:
        assert server.ask("/v1/models", host="evil.example").status == 200
        reply = server.ask("/v1/models", host="evil.example", origin="http://other.example")
        assert (reply.status, reply.error["code"]) == (403, "cross_site")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),  # a proxy speaks TLS
        ("https://example.org", 200),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(server, origin, status):
    headers = {"host": "localhost:8000", "origin": origin, **KEY}
    assert server.ask("/v1/predict", file(picture()), PNG, **headers).status == status


BROKEN = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
]


@pytest.mark.parametrize("sent", BROKEN)
def test_bytes_that_are_not_http_get_an_error_of_the_same_form(server, sent):
    head, _, body = everything(server.connect(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == "broken_request"


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/docs", "/openapi.json", "/healthz"])
def test_pages_do_not_name_models_and_need_no_key(server, path):
    reply = server.ask(path)
    assert reply.status == 200
    assert b"pets" not in reply.body


def test_the_description_is_a_page_without_scripts(server):
    reply = server.ask("/docs")
    text = reply.body.decode()
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self';" in reply.headers["content-security-policy"]
    assert "<script" not in text
    assert "http://" not in text.replace("Tokendial", "")
    for part in ("POST /v1/predict", "deadline_ms", "GET /metrics", "multipart/form-data"):
        assert part in text


def test_a_key_file_that_every_user_can_read_is_recognised(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key")
    for mode, readable in ((0o600, False), (0o640, False), (0o644, True)):
        os.chmod(keys, mode)
        assert readable_by_others(keys) == readable
