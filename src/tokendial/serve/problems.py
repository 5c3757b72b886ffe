"""The error body that clients receive, and the exception that carries it. No web framework."""

from pydantic import BaseModel, ConfigDict


class Problem(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    code: str
    """Short code of the error, for programs."""
    message: str
    """Explanation of the error in one line, for people."""
    field: str | None
    """Parameter or image that the error is about; null if it is about neither."""


class ProblemError(Exception):
    """A request that gets an error response."""

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
