"""Messages between the server, the fork server and model processes, and how they are sent.

    server -> fork server     LoadModels, then ForkProcess or WaitForExit
    fork server -> server     ModelsLoaded, then ProcessForked or ProcessExited
    server -> model process   RunBatch or ViewTokens
    model process -> server   ProcessReady, then BatchLogits or TokensViewed

Each message gets exactly one answer, or `Failed` in its place. All processes belong to the server,
so messages are pickled.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokendial.runtimes import Runtime

if TYPE_CHECKING:
    from tokendial.model.dial_vit import DialViT
    from tokendial.serve.workers.catalog import ModelCatalog
    from tokendial.serve.workers.models import LoadedModels
    from tokendial.serve.workers.token_view import TokenView

MessageT = TypeVar("MessageT")


@dataclass(frozen=True, slots=True)
class LoadModels:
    """Load models into memory."""

    load: "Callable[[], LoadedModels]"
    """Function that loads them; it is called in the fork server."""
    runtime: Runtime
    """Where and how model processes compute."""
    runtime_folder: Path | None
    """Where exported files are kept for the next start; None: they are not kept."""
    calibration: "Callable[[DialViT], Tensor] | None"
    """Function that reads the images that 8-bit files are calibrated on, see `Runtime.start`."""
    max_batch: int
    """Maximum number of images in a batch."""
    threads: int | None
    """Number of CPU threads of a model process; None: PyTorch's default."""


@dataclass(frozen=True, slots=True)
class ModelsLoaded:
    """The models are in memory."""

    catalog: "ModelCatalog"
    """Description of the models."""


@dataclass(frozen=True, slots=True)
class ForkProcess:
    """Fork a model process. Its two sockets follow this message."""

    runtime: Runtime | None
    """Where and how it computes; None: as `LoadModels` says."""


@dataclass(frozen=True, slots=True)
class ProcessForked:
    """A model process was forked."""

    pid: int
    """Process identifier."""


@dataclass(frozen=True, slots=True)
class WaitForExit:
    """Wait for a model process that was killed."""

    pid: int
    """Process identifier."""


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A model process has ended."""

    code: int | None
    """Exit code, negative for a signal, as in `subprocess`; None if it has not ended yet."""


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """A model process can run batches."""

    runtime: Runtime
    """Where and how it computes."""


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Run the first images in shared memory."""

    name: str
    """Name of the model."""
    degree: int
    """Degree of the dial."""
    num_images: int
    """Number of images."""
    embeddings: bool = False
    """Whether embeddings are wanted besides the logits."""


@dataclass(frozen=True, slots=True)
class BatchLogits:
    """Result of `RunBatch`."""

    logits: NDArray[np.float32]
    """Logits of the batch, [B, ...]."""
    embeddings: NDArray[np.float32] | None = None
    """Embeddings of the batch, [B, D]; None if they were not wanted."""


@dataclass(frozen=True, slots=True)
class ImageToEmbed:
    """An image whose output is its embedding. It can be in a batch with images for prediction."""

    tensor: Tensor
    """Normalised image, [3, H, W]."""


@dataclass(frozen=True, slots=True)
class ViewTokens:
    """Find out which tokens of an image each layer merges or drops."""

    name: str
    """Name of the model."""
    degree: int
    """Degree of the dial."""
    image: Tensor
    """Normalised image, [3, H, W]."""


@dataclass(frozen=True, slots=True)
class TokensViewed:
    """Result of `ViewTokens`."""

    view: "TokenView"
    """The tokens of each layer."""
    image_png: str
    """The image as the model sees it: base64 of a PNG."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer to a message that could not be carried out."""

    error: Exception
    """The error to raise in the server."""


def send(pipe: Connection, message: object) -> None:
    """Send a message.

    It is pickled here because `Connection.send` would pass tensors as open file descriptors.
    """
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe: Connection) -> object:
    """Receive the next message."""
    return pickle.loads(pipe.recv_bytes())


def receive_answer(pipe: Connection, kind: type[MessageT]) -> MessageT:
    """Receive a message of the given type; raise the error of a `Failed` in its place."""
    answer = receive(pipe)
    if isinstance(answer, Failed):
        raise answer.error
    if not isinstance(answer, kind):
        raise TypeError(f"the answer must be {kind.__name__}, got {type(answer).__name__}.")
    return answer
