"""Requests in the queue, the batches that their images run in, and refusals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokendial.serve.scheduling.controller import RequestGroup

RefusalReason = Literal["full", "late", "lost", "draining"]
"""Why a request is refused. "full": too many images wait. "late": its deadline cannot be met.
"lost": the model process was lost. "draining": the server is stopping."""


class RequestRefusedError(Exception):
    """A request that will not be answered. The message is one line for the client."""

    def __init__(self, reason: RefusalReason, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason
        self.retry_after_s = retry_after_s
        """Seconds after which another try may succeed."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in the queue: some images for one model."""

    name: str
    """Name of the model."""
    images: Sequence[Any]
    """The images; the scheduler only counts them."""
    degree: int | None
    """Degree that the request asks for; None: the degree of the dial."""
    arrived: float
    """Time of arrival."""
    deadline: float
    """Time by which the answer must be ready."""
    owner: Any
    """Object that waits for the answer. `cancelled()` says whether it no longer waits, `done()`
    whether it was answered, refused or cancelled; `refuse(error)` tells it that there will be no
    answer, and `keep_answer(index)` that an image will have no second one. None for a request that
    is only checked."""
    num_started: int = 0
    """Number of images that run or have run."""
    started_degree: int | None = None
    """Degree of its first batch. All images of a request run at the same degree."""
    idle_degree: int | None = None
    """Degree of the dial on arrival if nothing else waited. Such a request runs at this degree
    even if its own images have raised the dial since."""

    @property
    def num_waiting(self) -> int:
        """Number of images that wait."""
        return len(self.images) - self.num_started

    @property
    def fixed_degree(self) -> int | None:
        """Degree that the request must run at; None if the scheduler may choose."""
        return self.degree if self.started_degree is None else self.started_degree

    @property
    def group(self) -> RequestGroup:
        """Group of requests that it may share a batch with."""
        return self.name, self.fixed_degree


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that run together."""

    name: str
    """Name of the model."""
    degree: int
    """Degree of the whole batch."""
    parts: tuple[tuple[QueuedRequest, int], ...]
    """The images, each as its request and the index in the request's images."""
    again: bool = False
    """Whether the images have an answer already, which is unsure."""
