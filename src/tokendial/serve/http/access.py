"""Who may ask: API keys."""

import hmac
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from tokendial.serve.http.problems import ProblemError

_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, as a header.")


class KeyHolders:
    """A dependency that lets only those in who bring a key; everybody, if there are no keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __call__(
        self,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        header: Annotated[str | None, Depends(_HEADER)],
    ) -> None:
        """Check what a request brings."""
        brought = (bearer.credentials if bearer else header or "").encode(errors="replace")
        # Every key is compared, in constant time: how long it takes tells nothing about any.
        fitting = [hmac.compare_digest(brought, key) for key in self._keys]
        if self._keys and not any(fitting):
            raise ProblemError(
                401,
                "unauthorized",
                "An API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.",
                headers={"www-authenticate": "Bearer"},
            )
