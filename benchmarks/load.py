"""Load over HTTP, to a server on this machine.

Open: requests go out at the times of a trace, whatever the server does, and latency counts from the
time that was planned. Nothing that the server or the generator delays is left out of it. Closed:
some clients, each of which sends its next request when the last one is answered.
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
    sent: float | None = None
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
        """Whether it was answered with 200 within `slo` seconds."""
        return self.status == 200 and self.latency <= slo


def play(
    url: str, times: Times, bodies: Sequence[bytes], *, in_flight: int, timeout: float
) -> list[Exchange]:
    """Post at the times of a trace.

    Args:
        url: On this machine, by its address.
        times: Ascending, in seconds.
        bodies: JSON; taken in turn.
        in_flight: How many requests may be without an answer. One that would be more is not sent,
            which its `error` tells.
        timeout: Seconds after which an answer is given up.

    Raises:
        ValueError: If the server is not on this machine.
    """
    check_loopback(url)
    return asyncio.run(_play(url, times, bodies, in_flight, timeout))


def closed(
    url: str, bodies: Iterable[bytes], *, clients: int, timeout: float, seconds: float | None = None
) -> list[Exchange]:
    """Post each body once, or as many as can be in some seconds.

    A request is planned for when it is sent.

    Args:
        url: On this machine, by its address.
        bodies: JSON; without end only if `seconds` are given.
        clients: Requests at a time.
        timeout: Seconds after which an answer is given up.
        seconds: After which no request is sent; None: all of them are.

    Raises:
        ValueError: If the server is not on this machine.
    """
    check_loopback(url)
    return asyncio.run(_closed(url, bodies, clients, timeout, seconds))


def check_loopback(url: str) -> None:
    """Refuse other machines; a name could be anybody's.

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


async def _closed(
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
    """Reuse connections, but not for so long that the server closes them meanwhile."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Content-Type": "application/json"},
    ) as session:
        yield session
