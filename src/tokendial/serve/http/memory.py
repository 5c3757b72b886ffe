"""Bytes of clients that the server holds: those of requests, and of answers not yet taken."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendial.serve.http.problems import ProblemError, retry_after


class Memory:
    """A number of bytes that all requests share."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    def take(self, size: int) -> None:
        """Take some bytes; a ProblemError if there are not as many."""
        if self._taken + size > self._most:
            message = f"Requests and answers hold {self._most:,} bytes already."
            raise ProblemError(503, "busy", message, headers=retry_after(1.0))
        self._taken += size

    def give_back(self, size: int) -> None:
        """They are free again."""
        self._taken -= size


class Held:
    """What one request has taken."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._size = memory, 0

    def take(self, size: int) -> None:
        """Take some bytes more; a ProblemError if there are not as many."""
        self._memory.take(size)
        self._size += size

    def give_back(self) -> None:
        """All of them are free again."""
        self._memory.give_back(self._size)
        self._size = 0


class MemoryLimit:
    """Counts the bytes of each request, from the first that comes until its answer has been sent.

    Handlers add those of large answers: `request.state.held.take(size)`.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._memory = app, Memory(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = Held(self._memory)
        scope.setdefault("state", {})["held"] = held

        async def counted() -> Message:
            message = await receive()
            held.take(len(message.get("body", b"")))
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            held.give_back()
