"""What is refused by its head alone: other sites' requests, and too many query parameters."""

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokendial.serve.http.problems import failure
from tokendial.serve.http.schemas import Problem
from tokendial.serve.settings import Settings

_MOST_PARAMETERS = 16
"""Each unknown one costs an error message, and they come before anything else is known."""
_PROBES = ("/healthz", "/readyz")


class RequestChecks:
    """Passes requests on that a browser would send for this server's own pages.

    A page of another site may send forms to any address, and its name may be made to lead to this
    machine ("DNS rebinding"). It cannot choose `Host` and `Origin`, which tell where it comes from.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        own = ("localhost", socket.gethostname(), settings.host)
        self._allowed = frozenset(name.lower() for name in settings.allowed_hosts)
        self._names = self._allowed | {name.lower() for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        await (failure(*problem) if problem else self._app)(scope, receive, send)

    def _problem(self, scope: Scope) -> tuple[int, Problem] | None:
        if scope["query_string"].count(b"&") >= _MOST_PARAMETERS:
            message = f"At most {_MOST_PARAMETERS} query parameters are taken."
            return 422, Problem(code="invalid", message=message, field=None)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # Probes ask by whatever name they were given, and learn one word.
        if scope["path"] not in _PROBES and not self._allows(host):
            message = (
                "Host must be localhost, an IP address, or a name that the server knows: "
                "`tokendial serve --allowed-hosts NAME` adds one."
            )
            return 421, Problem(code="unknown_host", message=message, field="Host")
        if origin is not None and not self._same_site(origin, host):
            message = "Pages of other sites may not ask this server."
            return 403, Problem(code="cross_site", message=message, field="Origin")
        return None

    def _allows(self, host: str) -> bool:
        name = _name(host)
        return "*" in self._names or name in self._names or _is_address(name)

    def _same_site(self, origin: str, host: str) -> bool:
        # A proxy that speaks TLS changes the scheme.
        try:
            there = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return bool(there) and (there == host.lower() or _name(there) in self._allowed)


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.lower().rpartition(":")
    name = name if colon and port.isdecimal() else host.lower()
    return name.removeprefix("[").removesuffix("]")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
