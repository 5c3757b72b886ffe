"""Checks and limits that apply before a request reaches its handler.

Two middlewares, the first one outside of the second, and the dependency for API keys:

- `AdmissionMiddleware` limits concurrent requests and the size of their heads, and refuses
  requests while the server stops.
- `RequestMiddleware` refuses requests of other sites' pages, limits the bytes in memory, and counts
  responses.
"""

import hmac
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendial.serve.http.errors import error_response, retry_after_header
from tokendial.serve.http.metrics import Metrics
from tokendial.serve.problems import Problem, ProblemError
from tokendial.serve.settings import Settings

MAX_HEAD_BYTES = 32_768
"""Maximum size of a request's head: path, query string and headers."""
PREDICTION_PREFIX = "/v1/"
"""Paths whose requests take time and memory; all others are answered at once."""
_HEADER_OVERHEAD_BYTES = 32
"""Memory of a header beside its text."""
_ALWAYS_ANSWERED = ("/healthz", "/metrics")
_PROBES = ("/healthz", "/readyz")
_MAX_PARAMETERS = 16
"""Maximum number of query parameters. Each unknown one costs an error message."""
_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, as a header.")


class AdmissionMiddleware:
    """Limits concurrent requests and heads, and refuses requests while the server stops."""

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        """Wrap an application.

        Args:
            app: The application.
            max_requests: Maximum number of concurrent requests below `PREDICTION_PREFIX`.
        """
        self._app, self._max_requests, self._running = app, max_requests, 0
        self.closed = False
        """Whether new requests are refused because the server stops."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limited = scope["path"].startswith(PREDICTION_PREFIX)
        if response := self._refusal(scope, limited):
            await response(scope, receive, send)
            return
        self._running += limited
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= limited

    def _refusal(self, scope: Scope, limited: bool) -> JSONResponse | None:
        head = len(scope["raw_path"]) + len(scope["query_string"])
        head += sum(len(n) + len(value) + _HEADER_OVERHEAD_BYTES for n, value in scope["headers"])
        if head > MAX_HEAD_BYTES:
            return closing_response(431, "head_too_large", "The headers are too long.")
        if scope["path"] in _ALWAYS_ANSWERED:
            return None
        if self.closed:
            return closing_response(503, "draining", "The server is stopping.")
        if limited and self._running >= self._max_requests:
            message = f"At most {self._max_requests} requests are accepted at a time."
            return closing_response(503, "busy", message)
        return None


class RequestMiddleware:
    """Checks where a request comes from, limits its bytes, and counts the responses.

    A page of another site can send forms to any address. Its host name can be made to resolve to
    this machine (DNS rebinding). But a browser does not let it choose the headers `Host` and
    `Origin`, so these two tell where a request comes from.

    Handlers add the bytes of large answers to those of the request: `request.state.memory.take`.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._budget = MemoryBudget(settings.max_memory)
        own = ("localhost", socket.gethostname(), settings.host)
        self._allowed_sites = frozenset(name.lower() for name in settings.allowed_hosts)
        self._names = self._allowed_sites | {name.lower() for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        memory = RequestMemory(self._budget)
        scope.setdefault("state", {})["memory"] = memory

        async def receive_counted() -> Message:
            message = await receive()
            memory.take(len(message.get("body", b"")))
            return message

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(message["status"])
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await error_response(*refusal)(scope, receive, send_counted)
            else:
                await self._app(scope, receive_counted, send_counted)
        finally:
            memory.free()

    def _refusal(self, scope: Scope) -> tuple[int, Problem] | None:
        if scope["query_string"].count(b"&") >= _MAX_PARAMETERS:
            message = f"At most {_MAX_PARAMETERS} query parameters are accepted."
            return 422, Problem(code="invalid", message=message, field=None)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # Health probes use any name for the server, and learn nothing but one word.
        if scope["path"] not in _PROBES and not self._knows_name(host):
            message = (
                "Host must be localhost, an IP address, or a name that the server knows: "
                "`tokendial serve --allowed-hosts NAME` adds one."
            )
            return 421, Problem(code="unknown_host", message=message, field="Host")
        if origin is not None and not self._allows_origin(origin, host):
            message = "Pages of other sites may not use this server."
            return 403, Problem(code="cross_site", message=message, field="Origin")
        return None

    def _knows_name(self, host: str) -> bool:
        name = _without_port(host)
        return "*" in self._names or name in self._names or _is_ip_address(name)

    def _allows_origin(self, origin: str, host: str) -> bool:
        # The scheme is not compared, because a proxy in front may speak TLS.
        try:
            site = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return bool(site) and (site == host.lower() or _without_port(site) in self._allowed_sites)


class MemoryBudget:
    """Number of bytes that all requests share."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._used = max_bytes, 0

    def take(self, size: int) -> None:
        """Take bytes; raise a ProblemError (503) if too few are left."""
        if self._used + size > self._max_bytes:
            message = f"Requests and answers already hold {self._max_bytes:,} bytes."
            raise ProblemError(503, "busy", message, headers=retry_after_header(1.0))
        self._used += size

    def free(self, size: int) -> None:
        """Return bytes to the budget."""
        self._used -= size


class RequestMemory:
    """The bytes that one request has taken from the budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Take more bytes; raise a ProblemError (503) if too few are left."""
        self._budget.take(size)
        self._size += size

    def free(self) -> None:
        """Return all bytes of the request to the budget."""
        self._budget.free(self._size)
        self._size = 0


class ApiKeyCheck:
    """Dependency that requires one of the API keys; without keys, everyone is accepted."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    async def __call__(
        self,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        header: Annotated[str | None, Depends(_HEADER)],
    ) -> None:
        """Check the key of a request; raise a ProblemError (401) if it is wrong."""
        key = (bearer.credentials if bearer else header or "").encode(errors="replace")
        # All keys are compared, each in constant time, so that the time reveals nothing about them.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if self._keys and not any(matches):
            raise ProblemError(
                401,
                "unauthorized",
                "An API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.",
                headers={"www-authenticate": "Bearer"},
            )


def closing_response(status: int, code: str, message: str) -> JSONResponse:
    """Error response after which the connection is closed."""
    headers = {"connection": "close"} | (retry_after_header(1.0) if status == 503 else {})
    return error_response(status, Problem(code=code, message=message, field=None), headers)


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    name = name if colon and port.isdecimal() else host.lower()
    return name.removeprefix("[").removesuffix("]")


def _is_ip_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
