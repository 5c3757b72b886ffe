"""Bodies of requests and answers, as the OpenAPI page shows them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class OfModel(BaseModel):
    """Which model it is about."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    model: Annotated[str, Field(max_length=100)] | None = None
    """Name of the model; none: the first of `/v1/models`."""


class Options(OfModel):
    """What a client may ask for: query parameters, or fields of a JSON body."""

    degree: Literal["auto", "best"] | Annotated[int, Field(ge=0)] = "auto"
    """`auto`: as the load allows; `best`: the most accurate one; or a degree of the dial."""
    deadline_ms: Annotated[float, Field(gt=0)] | None = None
    """From the first byte of the request to the answer; at most the server's `--timeout-s`. What
    cannot be answered by then is refused at once. None: the objective of the server, from the last
    byte of the request."""
    top: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Classes to tell, most probable first; all of them if the model has fewer."""


class PredictBody(Options):
    """A request as JSON."""

    model_config = ConfigDict(strict=True)

    images: Annotated[list[str], Field(min_length=1), FailFast()]
    """Image files, each as base64."""


class Answer(BaseModel):
    """A body of ours: no field is ever invented by a client."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Class(Answer):
    """A class and its probability."""

    name: str
    probability: float


class Computed(Answer):
    """How an image was computed."""

    degree: int
    """Degree of the dial that it was run at."""
    queue_ms: float
    """Waiting for its turn."""
    compute_ms: float
    """Its batch in the model."""
    batch: int
    """Images that went together."""


class ClassesPrediction(Computed):
    """Classes of an image."""

    classes: list[Class]


class MaskPrediction(Computed):
    """The mask of an image."""

    mask: str
    """Base64 of a PNG of the image's size: grey levels of probability, or classes by a palette."""
    share: float
    """Share of the pixels that lie inside, or are of any class but the first."""


class Predictions(Answer):
    """Answer of `/v1/predict`."""

    model: str
    revision: str
    """Short hash of the model's weights."""
    predictions: list[ClassesPrediction | MaskPrediction]
    """In the order of the images."""


class Model(Answer):
    """A model that is served."""

    name: str
    kind: Literal["classes", "masks"]
    classes: list[str]
    revision: str
    default: bool
    """Whether requests without a model's name go to it."""


class Models(Answer):
    """Answer of `/v1/models`."""

    models: list[Model]


class Degree(Answer):
    """A position of the dial."""

    degree: int
    gmacs: float
    ms: float
    """One image alone, as measured on this machine."""
    accuracy: float | None
    """Of `tokendial eval`, if that was run."""


class Degrees(Answer):
    """Answer of `/v1/degrees`."""

    model: str
    degree: int
    """Where the dial stands now."""
    degrees: list[Degree]


class Second(Answer):
    """A second of the past."""

    t: float
    """Seconds before now, so never positive."""
    degree: int
    load: float
    """Images per second that were asked for."""
    p99_ms: float | None
    queued: int
    loop_lag_ms: float
    """The longest time that the server's event loop was late: for so long it answered nobody."""


class Live(Answer):
    """Answer of `/v1/live`."""

    now: float
    """Seconds since 1970."""
    degree: int
    queued: int
    """Images that wait."""
    arrivals_per_s: float
    utilisation: float
    answered: int
    """Images, since the start."""
    refused: dict[str, int]
    """Images by reason, since the start."""
    p50_ms: float | None
    p99_ms: float | None
    slo_ms: float
    history: list[Second]
    """One a second, the last of them the latest."""


class Problem(Answer):
    """What went wrong."""

    code: str
    """One word for programs."""
    message: str
    """One line for people."""
    field: str | None
    """The parameter or image that it is about."""


class Failure(Answer):
    """Every answer that is not a success."""

    error: Problem
