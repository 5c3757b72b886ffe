"""What clients are told when something is wrong: one form of body, never a stack trace."""

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokendial.serve.http.schemas import Failure, Problem
from tokendial.serve.scheduling.scheduler import Refused

_CODES = {404: "not_found", 405: "method_not_allowed"}
_MOST_LETTERS = 100
"""Of what a client called a field."""
_STATUS = {"full": 429, "late": 503, "lost": 503, "draining": 503}


class ProblemError(Exception):
    """A request that is not answered as it was meant."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        field: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.problem = Problem(code=code, message=message, field=field)


def failure(status: int, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """A body that says what is wrong."""
    return JSONResponse(Failure(error=problem).model_dump(), status_code=status, headers=headers)


def retry_after(seconds: float) -> dict[str, str]:
    """When to come again, in whole seconds, as the header wants it."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def refusal(refused: Refused) -> ProblemError:
    """What a client is told whose images are not taken."""
    headers = retry_after(refused.retry_after_s)
    if refused.reason == "draining":
        headers["connection"] = "close"
    return ProblemError(_STATUS[refused.reason], refused.reason, str(refused), headers=headers)


def invalid(errors: Sequence[Any], skip: int = 0) -> Problem:
    """What pydantic found wrong with the first field that it complains about.

    Args:
        errors: As pydantic lists them.
        skip: Parts of their locations that clients know nothing of.
    """

    def field(error: Any) -> str | None:
        parts = error["loc"][skip:]
        places = "".join(f"[{part}]" for part in parts[1:2] if isinstance(part, int))
        return f"{parts[0]}{places}"[:_MOST_LETTERS] if parts else None

    about = field(errors[0])
    # A field that may be one of several things has an error for each of them.
    messages = dict.fromkeys(error["msg"] for error in errors if field(error) == about)
    return Problem(code="invalid", message="; or: ".join(messages), field=about)


def install(app: FastAPI) -> None:
    """Let an application tell everything that goes wrong in this form."""

    @app.exception_handler(ProblemError)
    async def known(request: Request, error: ProblemError) -> Response:
        return failure(error.status, error.problem, error.headers)

    @app.exception_handler(RequestValidationError)
    async def mistaken(request: Request, error: RequestValidationError) -> Response:
        return failure(422, invalid(error.errors(), skip=1))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "refused")
        problem = Problem(code=code, message=str(error.detail), field=None)
        return failure(error.status_code, problem, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it

    # The framework raises it again once this is sent, so that the server logs where it arose.
    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:
        message = "The server failed; its log says why."
        return failure(500, Problem(code="internal", message=message, field=None))
