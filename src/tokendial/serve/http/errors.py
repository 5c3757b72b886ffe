"""Error responses: every error has the same JSON body, and none shows a stack trace."""

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokendial.serve.http.schemas import Failure
from tokendial.serve.problems import Problem, ProblemError
from tokendial.serve.scheduling.requests import RequestRefusedError

_CODES = {404: "not_found", 405: "method_not_allowed"}
_MAX_FIELD_LENGTH = 100
"""Characters of a field name, chosen by the client, that an error repeats."""
_REFUSAL_STATUS = {"full": 429, "late": 503, "lost": 503, "draining": 503}


def error_response(
    status: int, problem: Problem, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Response with the given status and the problem as its body."""
    return JSONResponse(Failure(error=problem).model_dump(), status_code=status, headers=headers)


def retry_after_header(seconds: float) -> dict[str, str]:
    """Header that says when to try again, in whole seconds and at least one."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def refusal_error(refused: RequestRefusedError) -> ProblemError:
    """Error for a client whose images the scheduler refused."""
    headers = retry_after_header(refused.retry_after_s)
    if refused.reason == "draining":
        headers["connection"] = "close"
    status = _REFUSAL_STATUS[refused.reason]
    return ProblemError(status, refused.reason, str(refused), headers=headers)


def validation_problem(errors: Sequence[Any], skip: int = 0) -> Problem:
    """Describe what pydantic found wrong with the first field that it lists.

    Args:
        errors: Errors as pydantic lists them.
        skip: Number of leading parts of their locations that clients do not know.
    """

    def field_name(error: Any) -> str | None:
        parts = error["loc"][skip:]
        index = "".join(f"[{part}]" for part in parts[1:2] if isinstance(part, int))
        return f"{parts[0]}{index}"[:_MAX_FIELD_LENGTH] if parts else None

    field = field_name(errors[0])
    # A field of a union type has one error for each member of the union.
    messages = dict.fromkeys(error["msg"] for error in errors if field_name(error) == field)
    return Problem(code="invalid", message="; or: ".join(messages), field=field)


def install_error_handlers(app: FastAPI) -> None:
    """Make an application answer every error with the body `Failure`."""

    @app.exception_handler(ProblemError)
    async def handle_problem(request: Request, error: ProblemError) -> Response:
        return error_response(error.status, error.problem, error.headers)

    @app.exception_handler(RequestValidationError)
    async def handle_validation(request: Request, error: RequestValidationError) -> Response:
        return error_response(422, validation_problem(error.errors(), skip=1))

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "refused")
        problem = Problem(code=code, message=str(error.detail), field=None)
        return error_response(error.status_code, problem, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def handle_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client is gone and reads nothing

    # Starlette raises the error again after this response is sent, so that the server logs it.
    @app.exception_handler(Exception)
    async def handle_failure(request: Request, error: Exception) -> Response:
        message = "The server failed; its log says why."
        return error_response(500, Problem(code="internal", message=message, field=None))
