"""Bodies of requests and responses, as the OpenAPI description shows them."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field

from tokendial.serve.problems import Problem
from tokendial.serve.workers.catalog import AnswerKind


class ModelChoice(BaseModel):
    """Which model a request is about."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    model: Annotated[str, Field(max_length=100)] | None = None
    """Name of the model. Without it, the first one of `/v1/models`."""


class ComputeOptions(ModelChoice):
    """How and when images are computed: query parameters, or fields of a JSON body."""

    degree: Literal["auto", "best"] | Annotated[int, Field(ge=0)] = "auto"
    """Degree of the dial. `auto` follows the load, `best` is the most accurate one, and a number
    is that degree."""
    deadline_ms: Annotated[float, Field(gt=0)] | None = None
    """Milliseconds from the first byte of the request after which the answer has no use. At most
    the server's `--timeout-s`. A request that cannot be answered by then is refused at once.
    Without it, the server's objective counts, from the last byte of the request."""


class PredictOptions(ComputeOptions):
    """Options of a prediction: query parameters, or fields of a JSON body."""

    top: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Number of classes to return, most probable first; fewer if the model has fewer."""


class EmbeddingOptions(ComputeOptions):
    """Options of embeddings: query parameters, or fields of a JSON body."""

    encoding_format: Literal["float", "base64"] = "float"
    """How an embedding is written. `float`: a list of numbers; `base64`: base64 of its float32
    numbers in little-endian order."""


_Images: TypeAlias = Annotated[list[str], Field(min_length=1), FailFast()]


class PredictBody(PredictOptions):
    """A prediction request as JSON."""

    model_config = ConfigDict(strict=True)

    images: _Images
    """Image files, each as base64."""


class EmbeddingBody(EmbeddingOptions):
    """A request for embeddings as JSON."""

    model_config = ConfigDict(strict=True)

    images: _Images
    """Image files, each as base64."""


class ResponseBody(BaseModel):
    """Base of all response bodies."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Class(ResponseBody):
    """A class and its probability."""

    name: str
    """Name of the class."""
    probability: float
    """Probability of the class, between 0 and 1."""


class Computed(ResponseBody):
    """How an image was computed."""

    degree: int
    """Degree of the dial that the image was run at."""
    unsure_at: list[int]
    """With a cascade: degrees at which the model was not sure enough of its answer. `degree` is
    among them if there was no time to run the image again."""
    queue_ms: float
    """Milliseconds that the image waited in the queue."""
    compute_ms: float
    """Milliseconds that its batch, or batches, took in the model."""
    batch: int
    """Number of images in its batch."""


class ClassesPrediction(Computed):
    """The most probable classes of an image."""

    classes: list[Class]
    """Classes, most probable first."""


class MaskPrediction(Computed):
    """The mask of an image."""

    mask: str
    """Base64 of a PNG that has the size of the image: probabilities as grey levels, or class
    indices with a palette."""
    share: float
    """Fraction of the pixels that lie inside the mask, or have any class but the first."""


class Embedding(Computed):
    """The embedding of an image."""

    index: int
    """Number of the image in the request, from 0."""
    embedding: list[float] | str
    """What the model gives before its classifier: pooled features. A list of numbers, or base64 of
    float32 numbers in little-endian order."""


Prediction: TypeAlias = ClassesPrediction | MaskPrediction | Embedding
"""What a model gives for an image."""


class Predictions(ResponseBody):
    """Response of `/v1/predict`."""

    model: str
    """Name of the model."""
    revision: str
    """Short hash of the model's weights."""
    predictions: list[Prediction]
    """One prediction per image, in the order of the images."""


class Embeddings(ResponseBody):
    """Response of `/v1/embeddings`."""

    model: str
    """Name of the model."""
    revision: str
    """Short hash of the model's weights."""
    data: list[Embedding]
    """One embedding per image, in the order of the images."""


class Model(ResponseBody):
    """A served model."""

    name: str
    """Name of the model."""
    kind: AnswerKind
    """What the model gives for an image."""
    classes: list[str]
    """Names of the model's classes."""
    revision: str
    """Short hash of the model's weights."""
    default: bool
    """Whether the model answers requests that name no model."""


class Models(ResponseBody):
    """Response of `/v1/models`."""

    models: list[Model]
    """The served models."""


class Degree(ResponseBody):
    """One degree of the dial."""

    degree: int
    """The degree."""
    gmacs: float
    """Multiply-accumulates of one image, in 1e9."""
    ms: float
    """Expected milliseconds of one image alone on this machine."""
    accuracy: float | None
    """Accuracy measured by `tokendial eval`; null if that was not run."""


class Degrees(ResponseBody):
    """Response of `/v1/degrees`."""

    model: str
    """Name of the model."""
    degree: int
    """Present degree of the dial."""
    degrees: list[Degree]
    """The degrees that the server offers."""


class Second(ResponseBody):
    """One second of the last minute."""

    t: float
    """End of this second relative to now, in seconds; never positive."""
    degree: int
    """Degree of the dial."""
    load: float
    """Images per second that arrived, including refused ones."""
    p99_ms: float | None
    """99th percentile of the latency in milliseconds; null if no image was answered."""
    queued: int
    """Number of waiting images."""
    loop_lag_ms: float
    """Longest delay of the server's event loop in milliseconds. During it, nothing was answered."""


class Live(ResponseBody):
    """Response of `/v1/live`."""

    now: float
    """Time in seconds since 1970."""
    degree: int
    """Present degree of the dial."""
    queued: int
    """Number of waiting images."""
    arrivals_per_s: float
    """Images per second that arrived lately, including refused ones."""
    utilisation: float
    """Fraction of the time that the arrivals need at this degree; above 1, the queue grows."""
    answered: int
    """Number of answered images since the start."""
    refused: dict[str, int]
    """Number of refused images since the start, by reason."""
    p50_ms: float | None
    """Median latency of the last seconds in milliseconds; null if no image was answered."""
    p99_ms: float | None
    """99th percentile of the latency of the last seconds in milliseconds; null if no image was
    answered."""
    slo_ms: float
    """The latency objective in milliseconds."""
    history: list[Second]
    """The last minute by second; the latest second comes last."""


class Failure(ResponseBody):
    """Body of every response that is not a success."""

    error: Problem
    """What went wrong."""
