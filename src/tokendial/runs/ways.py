"""Ways to run a model: schedules, runtimes and degrees, started and timed in turns."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tokendial.measure import time_in_rounds
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.runtimes import Runtime

_SECONDS = 0.3
"""Time to spend on measuring each way."""
BASE = Runtime()
"""What all ways are compared with, at degree 0."""
RUNTIMES = (
    BASE,
    Runtime("torch", "bf16"),
    Runtime("onnxruntime"),
    Runtime("onnxruntime", "int8"),
    Runtime("openvino"),
    Runtime("openvino", "bf16"),
    Runtime("openvino", "int8"),
)
"""The runtimes that are tried, where they are installed."""
Schedule = Literal["own", "fitted", "compensated"]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a model."""

    schedule: Schedule
    """own: the reduction method as it is. fitted: how many tokens each layer removes was searched
    for the cost of each degree. compensated: as it is, with a compensator."""
    runtime: Runtime
    """Where and how it computes."""
    degrees: tuple[int, ...]
    """The degree; two are a cascade of the first and the last."""

    def __str__(self) -> str:
        kind = "cascade" if len(self.degrees) > 1 else "degree"
        dial = "→".join(map(str, self.degrees))
        schedule = "" if self.schedule == "own" else f" ({self.schedule})"
        return f"{self.runtime.name} {self.runtime.precision}, {kind} {dial}{schedule}"


class StartedRuntimes:
    """Models that are started in runtimes, and their times."""

    def __init__(
        self,
        images: Tensor,
        calibration: Callable[[DialViT], Tensor],
        folder: Path,
        time_is_up: Callable[[], bool],
        note: Callable[[str], None],
        notes: list[str],
    ) -> None:
        self.images, self.calibration, self.folder = images, calibration, folder
        self.time_is_up, self.note, self.notes = time_is_up, note, notes
        self.started: dict[tuple[Schedule, Runtime], InferenceModel] = {}

    def start(
        self,
        schedule: Schedule,
        model: DialViT,
        degrees: Sequence[int],
        runtimes: Iterable[Runtime],
    ) -> None:
        """Start a model in each runtime; those that cannot are noted."""
        for runtime in runtimes:
            name = f"{runtime.name} {runtime.precision}, {schedule} schedules"
            self.note(f"starting {name}")
            try:
                if self.time_is_up() and runtime != BASE:
                    raise ValueError("no time left.")
                self.started[schedule, runtime] = runtime.start(
                    model,
                    self.images,
                    degrees=degrees,
                    folder=self.folder / schedule,
                    calibration=self.calibration,
                )
            except ValueError as error:
                self.notes.append(f"{name}: {error}")

    def measure(self, ways: Sequence[Way]) -> dict[Way, float]:
        """Seconds of a batch in each way; all of them take turns."""

        def switch(way: Way) -> InferenceModel:
            model = self.started[way.schedule, way.runtime]
            model.set_degree(way.degrees[0])
            return model

        with torch.inference_mode():
            timings = time_in_rounds(
                ways,
                switch,
                lambda model: model(self.images),
                device=self.images.device,
                seconds=_SECONDS,
            )
        return {way: timing.seconds for way, timing in zip(ways, timings, strict=True)}
