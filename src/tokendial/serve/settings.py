"""Settings of the server: where it listens, its latency objective, and its limits for clients."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tokendial.runtimes import PLAIN, Runtime

KEYS_VARIABLE = "TOKENDIAL_API_KEYS"

_ENGINE_SHARE = 0.9
"""Fraction of the latency objective that the engine may use; the rest is for writing the answer."""
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Settings of the server. The defaults suit one machine.

    The options of `tokendial serve` are made from these fields: name, type, default, range, and
    docstring (as the help text).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    slo_ms: Annotated[float, Field(gt=0)] = 100.0
    """Latency objective: milliseconds from the arrival of an image to its answer. If it is not
    set, it is 100 ms, or three times what the model needs for one image here, whichever is
    longer."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts requests of this machine only."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on. 0 takes any free port."""
    allowed_hosts: tuple[str, ...] = ()
    """Host name that requests may use for this server, in addition to localhost, IP addresses,
    the machine's name and the listening address. Can be repeated; * allows every name."""
    degree: Annotated[int, Field(ge=0)] | None = None
    """Degree for all requests that do not ask for one. Without it, the degree follows the load."""
    max_degree: Annotated[int, Field(ge=0)] | None = None
    """Highest degree that the server offers. Without it, all degrees of the model are offered."""
    min_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Degrees with a lower accuracy, as measured by `tokendial eval`, are not offered."""
    compensator: str | None = None
    """Folder of a compensator (ToCom), which makes high degrees more accurate."""
    cascade: bool = False
    """Give images a second answer at a better degree where the first one is unsure and there is
    time. Needs a run that `tokendial cascade` was run on; degrees between the cascade's are left
    out."""
    max_batch: Count = 32
    """Maximum number of images in one batch."""
    max_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """Milliseconds that an incomplete batch may wait for more images."""
    max_queue: Count = 512
    """Maximum number of waiting images."""
    runtime: Runtime = PLAIN
    """Where and how the model computes."""
    threads: Count | None = None
    """Number of CPU threads of the model. Without it, PyTorch chooses."""
    spare: bool = True
    """Keep a second model process ready where starting one takes long: on a GPU, or with
    --runtime, --precision, --optimize or --compile. It needs the memory of the model once more."""
    decoders: Count = 3
    """Number of processes that decode images. All but one of them also decode large images."""
    max_decode_s: Annotated[float, Field(gt=0)] = 4.0
    """Maximum processor seconds to decode one image."""
    max_bytes: Count = 10 * 2**20
    """Maximum size of one request in bytes."""
    # Pillow itself refuses images above twice its own limit, whatever is set here.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 50_000_000
    """Maximum number of pixels of one image, read from its header. Large images that are decoded
    at the same time share this number."""
    max_images: Count = 32
    """Maximum number of images in one request."""
    max_memory: Count = 512 * 2**20
    """Maximum bytes of all requests and masks in memory. Requests beyond are answered with 503."""
    max_connections: Count = 256
    """Maximum number of concurrent requests to /v1. Further requests are answered with 503. The
    server accepts twice as many connections; it then closes the oldest one that is not waiting
    for a prediction."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a client has to send its request. Also the seconds that a stopping server has
    to answer the last requests."""
    api_keys: Annotated[tuple[str, ...], Field(repr=False)] = ()
    """Accepted API keys; each request must bring one of them. Without keys, anyone who reaches
    the server may use it."""

    @property
    def engine_slo_s(self) -> float:
        """Seconds within which the engine must finish, so that the answer is sent in time."""
        return _ENGINE_SHARE * self.slo_ms / 1000

    @property
    def max_deadline_ms(self) -> float:
        """Longest deadline, in milliseconds, that a client may set."""
        return max(self.slo_ms, 1000 * self.timeout_s)


def check_settings(values: Mapping[str, Any]) -> Settings:
    """Build settings from a mapping; raise a ValueError of one line for a wrong value."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(_error_line(error.errors()[0])) from None
    if settings.cascade and settings.degree is not None:
        raise ValueError(f"degree cannot be combined with cascade, got {settings.degree}.")
    return settings


def _error_line(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{where} is not a setting; known are {', '.join(sorted(Settings.model_fields))}."
    return f"{where}: {error['msg']}, got {error['input']!r}."


def read_api_keys(
    file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Read API keys from a file (one per line) and from TOKENDIAL_API_KEYS (comma-separated).

    Raises:
        ValueError: If the file or the variable exists but holds no key, or a key contains
            characters that an HTTP header cannot carry. Messages never show a key.
    """
    keys: list[str] = []
    if file is not None:
        keys += _check_keys(file.read_text().splitlines(), str(file))
    if (text := environment.get(KEYS_VARIABLE)) is not None:
        keys += _check_keys(text.split(","), KEYS_VARIABLE)
    return tuple(dict.fromkeys(keys))


def readable_by_others(file: Path) -> bool:
    """Whether every user of the machine may read a file."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def _check_keys(entries: list[str], source: str) -> list[str]:
    keys = [key for entry in entries if (key := entry.strip())]
    if not keys:
        raise ValueError(f"api_keys: {source} holds no key.")
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"api_keys: key {number} of {source} must be printable ASCII without blanks."
            )
    return keys
