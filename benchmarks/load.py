"""Load over HTTP, to a server on this machine.

Open load (`play`): requests are sent at the times of a trace, even if the server is slow. Latency
counts from the planned time, so it includes all delays of the server and of the load generator.
Closed load (`play_closed`): each client sends its next request when the last one is answered.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from benchmarks.arrivals import Times

_AHEAD_S = 0.05
"""Seconds between the call and the start of a load, so that its first request is not late."""


@dataclass(slots=True)
class Exchange:
    """A request and its outcome. Times are in seconds from the start of the load."""

    number: int
    """Number of the request in the load."""
    planned: float
    """Planned time of sending."""
    sent: float | None = None
    """Time at which the request was sent; None if it was not sent."""
    answered: float | None = None
    """Time at which the whole answer had arrived."""
    status: int | None = None
    """HTTP status; None without an answer."""
    body: bytes = b""
    """Body of the answer."""
    error: str | None = None
    """Reason why there is no answer."""

    @property
    def latency(self) -> float:
        """Seconds from the planned time to the answer; infinite without one."""
        return float("inf") if self.answered is None else self.answered - self.planned

    def within(self, slo: float) -> bool:
        """Whether the request was answered with status 200 within `slo` seconds."""
        return self.status == 200 and self.latency <= slo


def play(
    url: str, times: Times, bodies: Sequence[bytes], *, in_flight: int, timeout: float
) -> list[Exchange]:
    """Send POST requests at the times of a trace.

    Args:
        url: URL to send to; its host must be a loopback address.
        times: Times of the requests in seconds, ascending.
        bodies: JSON bodies of the requests, used in turn.
        in_flight: Maximum number of requests without an answer. A request beyond it is not sent;
            its `error` says so.
        timeout: Seconds to wait for an answer.

    Raises:
        ValueError: If the server is not on this machine.
    """
    check_loopback(url)
    return asyncio.run(_play(url, times, bodies, in_flight, timeout))


def play_closed(
    url: str, bodies: Iterable[bytes], *, clients: int, timeout: float, seconds: float | None = None
) -> list[Exchange]:
    """Send POST requests by some clients, each of which waits for an answer before its next one.

    The planned time of a request is the time at which it is sent.

    Args:
        url: URL to send to; its host must be a loopback address.
        bodies: JSON bodies of the requests. They may be endless if `seconds` is given.
        clients: Number of clients, and so of requests at the same time.
        timeout: Seconds to wait for an answer.
        seconds: Seconds after which no request is sent; None sends all bodies.

    Raises:
        ValueError: If the server is not on this machine.
    """
    check_loopback(url)
    return asyncio.run(_play_closed(url, bodies, clients, timeout, seconds))


def check_loopback(url: str) -> None:
    """Check that a URL has the address of this machine. A host name could be another machine's.

    Raises:
        ValueError: If the host is not a loopback address.
    """
    host = urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ValueError(f"url must name a loopback address, as http://127.0.0.1:8000, got {url}")


async def _play(
    url: str, times: Times, bodies: Sequence[bytes], in_flight: int, timeout: float
) -> list[Exchange]:
    async with _session(timeout) as session:
        now = asyncio.get_running_loop().time
        exchanges = []
        waiting: set[asyncio.Task[None]] = set()
        start = now() + _AHEAD_S
        for number, planned in enumerate(times.tolist()):
            await asyncio.sleep(max(0.0, start + planned - now()))
            exchange = Exchange(number, planned)
            exchanges.append(exchange)
            if len(waiting) >= in_flight:
                exchange.error = f"not sent: {in_flight} in flight"
                continue
            body = bodies[number % len(bodies)]
            task = asyncio.create_task(_post(session, url, body, exchange, start))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)
    return exchanges


async def _play_closed(
    url: str, bodies: Iterable[bytes], clients: int, timeout: float, seconds: float | None
) -> list[Exchange]:
    async with _session(timeout) as session:
        now = asyncio.get_running_loop().time
        exchanges: list[Exchange] = []
        left = iter(bodies)
        start = now()

        async def client() -> None:
            while seconds is None or now() < start + seconds:
                if (body := next(left, None)) is None:
                    return
                exchange = Exchange(len(exchanges), now() - start)
                exchanges.append(exchange)
                await _post(session, url, body, exchange, start)

        await asyncio.gather(*(client() for _ in range(clients)))
    return exchanges


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, exchange: Exchange, start: float
) -> None:
    now = asyncio.get_running_loop().time
    exchange.sent = now() - start
    try:
        # A redirection could lead to another machine.
        async with session.post(url, data=body, allow_redirects=False) as answer:
            exchange.body = await answer.read()
            exchange.status, exchange.answered = answer.status, now() - start
    except (aiohttp.ClientError, TimeoutError) as error:
        exchange.error = f"{type(error).__name__}: {error}"


@asynccontextmanager
async def _session(timeout: float) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that closes idle connections earlier than the server does."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Content-Type": "application/json"},
    ) as session:
        yield session
