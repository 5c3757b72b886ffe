"""The load generator, against a small server of its own."""

import itertools
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from local_server import local_server

from benchmarks.load import Exchange, check_loopback, play, play_closed


@pytest.fixture
def serve():
    """Start a server that answers a body as it is told; ends with the test."""
    with ExitStack() as stack:
        yield lambda behave: stack.enter_context(local_server(lambda _, body: behave(body)))


def test_requests_go_out_whatever_the_server_does(serve):
    """The server answers nobody before all have come, and the generator does not wait for it."""
    all_here = threading.Barrier(20)

    def behave(body):
        all_here.wait(10)
        return 200, body

    times = np.linspace(0, 0.2, 20)
    bodies = [b'"a"', b'"b"', b'"c"']
    exchanges = play(serve(behave).url, times, bodies, in_flight=20, timeout=10)
    assert [exchange.status for exchange in exchanges] == [200] * 20
    assert [exchange.body for exchange in exchanges] == [bodies[n % 3] for n in range(20)]
    assert [exchange.planned for exchange in exchanges] == times.tolist()
    assert all(e.planned <= e.sent <= e.answered for e in exchanges)
    assert all(exchange.answered >= times[-1] for exchange in exchanges)


def test_no_more_than_some_are_in_flight(serve):
    free = threading.Event()

    def behave(body):
        free.wait(10)
        return 200, body

    threading.Timer(0.5, free.set).start()
    exchanges = play(serve(behave).url, np.zeros(8), [b"1"], in_flight=3, timeout=10)
    assert [exchange.status for exchange in exchanges] == [200] * 3 + [None] * 5
    assert {exchange.error for exchange in exchanges[3:]} == {"not sent: 3 in flight"}
    assert {exchange.sent for exchange in exchanges[3:]} == {None}


def test_latency_counts_from_the_planned_time():
    assert Exchange(0, planned=1.0, sent=2.5, answered=3.0, status=200).latency == 2.0
    assert Exchange(0, planned=1.0, sent=2.5).latency == float("inf")


def test_clients_keep_their_connections(serve):
    server = serve(lambda body: (200, body))
    bodies = [str(number).encode() for number in range(30)]
    exchanges = play_closed(server.url, bodies, clients=2, timeout=10)
    assert sorted(int(exchange.body) for exchange in exchanges) == list(range(30))
    assert server.connections == 2


def test_clients_end_with_the_time(serve):
    def behave(body):
        time.sleep(0.01)
        return 200, body

    exchanges = play_closed(
        serve(behave).url, itertools.repeat(b"1"), clients=3, timeout=9, seconds=0.2
    )
    assert len(exchanges) > 3
    assert all(exchange.status == 200 for exchange in exchanges)


def test_refusals_and_redirections_are_answers(serve):
    statuses = itertools.cycle([429, 503, 307])
    exchanges = play_closed(
        serve(lambda _: (next(statuses), b"{}")).url, [b"1"] * 3, clients=1, timeout=10
    )
    assert [exchange.status for exchange in exchanges] == [429, 503, 307]


def test_an_answer_that_does_not_come_is_given_up(serve):
    late = threading.Event()

    def behave(body):
        late.wait(10)
        return 200, body

    [exchange] = play_closed(serve(behave).url, [b"1"], clients=1, timeout=0.2)
    late.set()
    assert exchange.status is None
    assert exchange.error.startswith("TimeoutError")


def test_a_server_that_is_gone_is_an_error():
    with local_server(lambda _, body: (200, body)) as server:
        pass
    [exchange] = play(server.url, np.zeros(1), [b"1"], in_flight=1, timeout=5)
    assert exchange.status is None
    assert exchange.error.startswith("ClientConnectorError")


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.0.7:8000/",
        "http://example.org/",
        "http://localhost:8000/",
        "http://127.0.0.1@example.org/",
        "127.0.0.1:8000",
    ],
)
def test_other_machines_are_left_alone(url):
    with pytest.raises(ValueError, match="must name a loopback address"):
        play(url, np.zeros(1), [b"1"], in_flight=1, timeout=1)
    with pytest.raises(ValueError, match="must name a loopback address"):
        play_closed(url, [b"1"], clients=1, timeout=1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://127.8.0.1/", "http://[::1]:80/"])
def test_loopback_has_many_addresses(url):
    check_loopback(url)
