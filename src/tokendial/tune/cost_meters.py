"""What a schedule costs, layer by layer and end to end: in seconds here, or counted."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from tokendial.measure.cost import count_parts
from tokendial.measure.timing import time_in_rounds
from tokendial.model.dial_vit import DialViT, Step
from tokendial.tune.schedules import Schedule, ScheduleSpace

MIN_ROUNDS, _MOST_TURNS = 3, 25


class ScheduledModel:
    """A model that runs by any schedule."""

    def __init__(self, model: DialViT, space: ScheduleSpace) -> None:
        self.model, self.space = model, space

    def turn(self, schedule: Schedule) -> DialViT:
        """The model, so that it runs by `schedule` from now on."""
        model = self.model
        reduces = any(schedule)
        if reduces:
            # Methods that can be tried have no weights, and state of their own neither.
            model.reducer = self.space.method([schedule]).build(self.space.shape).eval()
        model.set_degree(int(reduces))
        return model


@contextmanager
def try_schedules(model: DialViT, space: ScheduleSpace) -> Iterator[ScheduledModel]:
    """Try schedules in a `with` block; the model is then as it was."""
    before, degree, training = model.reducer, model.degree, model.training
    try:
        yield ScheduledModel(model.eval(), space)
    finally:
        model.reducer, model.degree = before, degree
        model.train(training)


class CostMeter(Protocol):
    """Tells costs, in a unit of its own."""

    exact: bool
    """Whether the same question has the same answer."""
    spread: float
    """Largest quartile spread of the times in the last comparison, see `Timing`; 0 if counted."""

    def layers(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Costs of the layers from `first`, 2 at least, to `last`."""

    def one(self, schedule: Schedule) -> float:
        """Cost of a forward pass."""

    def whole(self, schedules: Sequence[Schedule]) -> list[float]:
        """Costs of forward passes, compared with each other."""


class Stopwatch:
    """Seconds of a batch of images, on the device and in the arithmetic of the model."""

    exact = False

    def __init__(self, tried: ScheduledModel, images: Tensor, seconds: float) -> None:
        """Measure forward passes.

        Args:
            tried: The model.
            images: A batch [B, 3, H, W], which lies where the model does.
            seconds: For each schedule that is compared with others, if a few passes take less.
        """
        self.tried, self.images, self.seconds = tried, images, seconds
        self.spread = 0.0

    @torch.no_grad()
    def layers(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Of one run, up to layer `last`."""
        model = self.tried.turn(schedule)
        times = [self._now()]
        for _ in islice(model.steps(self.images), last):
            times.append(self._now())
        return [after - before for before, after in pairwise(times)][first - 1 :]

    @torch.no_grad()
    def whole(self, schedules: Sequence[Schedule]) -> list[float]:
        """Times of passes that take turns, so that a busy machine slows all of them alike."""
        timings = time_in_rounds(
            schedules,
            self.tried.turn,
            lambda: self.tried.model(self.images),
            device=self.images.device,
            seconds=self.seconds,
            least_rounds=MIN_ROUNDS,
            most_rounds=_MOST_TURNS,
        )
        self.spread = max(timing.spread for timing in timings)
        return [timing.seconds for timing in timings]

    @torch.no_grad()
    def one(self, schedule: Schedule) -> float:
        """Seconds of a single pass."""
        model = self.tried.turn(schedule)
        before = self._now()
        model(self.images)
        return self._now() - before

    def _now(self) -> float:
        if self.images.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


class MacCounter:
    """Multiply-accumulates of one image, counted."""

    exact = True
    spread = 0.0

    def __init__(self, tried: ScheduledModel) -> None:
        self.tried = tried

    def layers(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Of one run, up to layer `last`."""
        model = self.tried.turn(schedule)

        def run(call: nn.Module) -> Iterator[Step]:
            images = torch.empty(1, *model.anatomy.input_shape, device="meta")
            return islice(model.steps(images), last)

        return [float(macs) for macs in count_parts(model, run)[first - 1 :]]

    def one(self, schedule: Schedule) -> float:
        """As `DialViT.cost` counts."""
        return self.tried.turn(schedule).cost().macs

    def whole(self, schedules: Sequence[Schedule]) -> list[float]:
        """Each by itself."""
        return list(map(self.one, schedules))
