"""What a server is told: where it listens, what it promises, and what it takes from a client."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tokendial.tune import SpeedSettings

KEYS_VARIABLE = "TOKENDIAL_API_KEYS"

_ENGINES = 0.9
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """The objective, the dial, limits and keys; the defaults suit one machine."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen at; the default takes requests of this machine only."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0: any that is free."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may call this server by (the header Host), besides localhost, the
    machine's own name, `host` and IP addresses; "*": any name."""
    slo_ms: Annotated[float, Field(gt=0)] = 100.0
    """The promise: an image is answered within so many milliseconds after it has arrived. If it is
    not set, `starting` makes it as long as the models need here."""
    degree: Annotated[int, Field(ge=0)] | None = None
    """A degree for all who ask for none; None: the controller's."""
    max_degree: Annotated[int, Field(ge=0)] | None = None
    """Degrees above are not offered; None: all are."""
    min_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Degrees that `tokendial eval` found to be less accurate are not offered."""
    max_batch: Count = 32
    """Most images that run together."""
    max_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """How long a batch that is not full may wait for others to come."""
    max_queue: Count = 512
    """Most images that may wait."""
    compensator: str | None = None
    """Folder of a compensator that bridges the degrees."""
    speed: SpeedSettings = SpeedSettings()
    """How the model is sped up on this machine before it serves."""
    threads: Count | None = None
    """Threads of the model; None: torch's choice."""
    spare: bool = True
    """Whether a second process stands by where it takes long to make one ready: on an accelerator,
    or with `speed`. It has the memory of the model once more."""
    max_bytes: Count = 10 * 2**20
    """Most bytes of a request."""
    max_memory: Count = 512 * 2**20
    """Most bytes of requests and masks that the server holds at a time; what is more is answered
    503."""
    # Above twice Pillow's own limit it refuses whatever we say.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 50_000_000
    """Most pixels of an image, by its header. Large images that are decoded at the same time have
    together at most as many, too."""
    max_images: Count = 32
    """Most images of a request."""
    max_connections: Count = 256
    """Most requests to `/v1` at a time; whoever comes later is answered 503. Of connections there
    may be twice as many; then the oldest that asks for no prediction is closed for a new one."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a client has to send a request, and a server that is told to end, to answer."""
    decoders: Count = 3
    """Processes that decode images. All but one decode large images, too."""
    max_decode_s: Annotated[float, Field(gt=0)] = 4.0
    """Most seconds of a processor that decoding an image may take."""
    api_keys: Annotated[tuple[str, ...], Field(repr=False)] = ()
    """A request has to bring one of these; none: whoever reaches the server may ask."""

    @property
    def engine_slo_s(self) -> float:
        """Seconds of the promise in which the engine has to be done: the answer has a way to go."""
        return _ENGINES * self.slo_ms / 1000

    @property
    def max_deadline_ms(self) -> float:
        """Milliseconds that a request may wait at most for its answer."""
        return max(self.slo_ms, 1000 * self.timeout_s)


def check_settings(values: Mapping[str, Any]) -> Settings:
    """Settings of a mapping; a ValueError in one line says what is wrong."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(_one_line(error.errors()[0])) from None


def _one_line(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{where} is not a setting; known are {', '.join(sorted(Settings.model_fields))}."
    return f"{where}: {error['msg']}, got {error['input']!r}."


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys of a file, one a line, and of the environment, separated by commas.

    Raises:
        ValueError: If the file or the variable is there but holds no key, or one that no header
            can carry. Messages never show a key.
    """
    keys: list[str] = []
    if file is not None:
        keys += _checked(file.read_text().splitlines(), str(file))
    if (text := environment.get(KEYS_VARIABLE)) is not None:
        keys += _checked(text.split(","), KEYS_VARIABLE)
    return tuple(dict.fromkeys(keys))


def readable_by_others(file: Path) -> bool:
    """Whether every user of the machine may read a file."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def _checked(entries: list[str], where: str) -> list[str]:
    keys = [key for entry in entries if (key := entry.strip())]
    if not keys:
        raise ValueError(f"api_keys: {where} holds no key.")
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"api_keys: key {number} of {where} must be printable ASCII without blanks."
            )
    return keys
