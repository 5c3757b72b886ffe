"""Hundreds of requests that make no sense: none is an error of the server, which stays healthy."""

import json
from base64 import b64encode
from collections import Counter

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import everything, file, form, picture, serving

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
statuses: Counter[int] = Counter()
CLOSE = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
POST = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def server(pets):
    with serving({"pets": pets}, max_images=4, max_pixels=10_000) as running:
        yield running
        good = running.predict(file(picture()))
        assert good.status == 200
        assert running.ask("/healthz").status == running.ask("/readyz").status == 200
    mistaken = sum(count for status, count in statuses.items() if 400 <= status < 500)
    assert mistaken >= 300


def test_requests_generated_from_the_openapi_description(server):
    schema = schemathesis.openapi.from_dict(server.ask("/openapi.json").json)
    schema.config.update(base_url=f"http://127.0.0.1:{server.port}")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/predict", "/v1/degrees"} <= {operation.path for operation in operations}
    cases = st.one_of(
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in GenerationMode
    )

    @settings(max_examples=200)
    @given(cases)
    def ask(case):
        reply = case.call_and_validate(checks=CHECKS)
        statuses[reply.status_code] += 1
        refused = reply.status_code == 503 and "retry-after" in reply.headers
        assert reply.status_code < 500 or refused

    ask()


@pytest.mark.parametrize("kind", FORMATS)
def test_files_with_a_few_wrong_bytes(server, kind):
    whole = file(picture(), kind)
    places = st.integers(0, len(whole) - 1)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)

    @settings(max_examples=30)
    @given(changes, st.integers(1, len(whole)))
    def ask(changes, length):
        broken = bytearray(whole)
        for place, value in changes:
            broken[place] = value
        reply = server.ask("/v1/predict", bytes(broken[:length]), f"image/{kind.lower()}")
        statuses[reply.status] += 1
        assert reply.status in (200, 413, 422), reply.body

    ask()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
FIELDS = st.sampled_from(["images", "model", "degree", "deadline_ms", "top", "path"])


def test_json_of_any_form(server):
    image = b64encode(file(picture())).decode()

    @settings(max_examples=80)
    @given(st.dictionaries(FIELDS, ANYTHING, max_size=3), st.booleans())
    def ask(fields, with_image):
        body = json.dumps({"images": [image], **fields} if with_image else fields).encode()
        reply = server.ask("/v1/predict", body, "application/json")
        statuses[reply.status] += 1
        assert reply.status < 500, reply.body

    ask()


def test_forms_with_wrong_bytes(server):
    body, kind = form(file(picture()), b"x")

    @settings(max_examples=60)
    @given(st.integers(0, 120), st.binary(max_size=8), st.integers(0, len(body)))
    def ask(place, put, length):
        reply = server.ask("/v1/predict", (body[:place] + put + body[place:])[:length], kind)
        statuses[reply.status] += 1
        assert 400 <= reply.status < 500, reply.body

    ask()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz" + CLOSE + b"X: " + 50_000 * b"x" + b"\r\n\r\n",
        b"GET /healthz" + CLOSE + 5000 * b"X: 1\r\n" + b"\r\n",
        b"GET /healthz?" + 50_000 * b"x" + CLOSE + b"\r\n",
        b"GET /nowhere HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 9" + 99 * b"9" + b"\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_heads_that_are_no_http(server, head):
    reply = everything(server.connect(head))
    status = int(reply.split(b" ", 2)[1])
    statuses[status] += 1
    assert 400 <= status < 500 or status == 501
