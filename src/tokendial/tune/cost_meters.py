"""Cost of a schedule, per layer and per forward pass: measured in seconds, or counted in MACs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from tokendial.measure.cost import count_macs_by_part
from tokendial.measure.timing import time_in_rounds
from tokendial.model.blocks import Step
from tokendial.model.dial_vit import DialViT
from tokendial.tune.schedules import Schedule, ScheduleSpace

MIN_ROUNDS, _MAX_ROUNDS = 3, 25


class ScheduledModel:
    """A model that can be switched from one schedule to another."""

    def __init__(self, model: DialViT, space: ScheduleSpace) -> None:
        self.model, self.space = model, space
        self._own = model.reducer
        """The model's own reducer. Its weights, if any, serve every schedule."""
        self.method = space.reduce
        """The method that follows the schedules: that of the space, or a variant of it."""

    def use(self, schedule: Schedule) -> DialViT:
        """Switch the model to `schedule`, and return it."""
        model = self.model
        reduces = any(schedule)
        if reduces:
            reducer = self.method.with_schedules([schedule]).build(self.space.shape)
            if next(reducer.parameters(), None) is not None:
                assert self._own is not None  # as `method_to_fit` checks
                reducer.load_state_dict(self._own.state_dict(), assign=True)
            model.reducer = reducer.eval()
        model.set_degree(int(reduces))
        return model


@contextmanager
def try_schedules(model: DialViT, space: ScheduleSpace) -> Iterator[ScheduledModel]:
    """Run a model by other schedules in a `with` block, and restore it afterwards."""
    before, degree, training = model.reducer, model.degree, model.training
    try:
        yield ScheduledModel(model.eval(), space)
    finally:
        model.reducer, model.degree = before, degree
        model.train(training)


class CostMeter(Protocol):
    """Measures costs in its own unit."""

    exact: bool
    """Whether repeated measurements give the same number."""
    spread: float
    """Largest quartile spread of the times in the last comparison, see `Timing`. 0 if exact."""
    start_seconds: float
    """Seconds that it takes to make a schedule ready to be measured."""

    def compare(self, schedules: Sequence[Schedule]) -> list[float]:
        """Costs of forward passes by several schedules, to be compared."""


class LayerMeter(CostMeter, Protocol):
    """Measures the costs of single layers as well."""

    def layer_costs(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Costs of the layers `first` to `last`; `first` is at least 2."""

    def single_cost(self, schedule: Schedule) -> float:
        """Cost of one forward pass."""


class Stopwatch:
    """Measures the seconds that a batch takes, on the device and in the dtype of the model."""

    exact = False
    start_seconds = 0.0

    def __init__(self, scheduled_model: ScheduledModel, images: Tensor, seconds: float) -> None:
        """Set up measurements.

        Args:
            scheduled_model: The model to run by different schedules.
            images: A batch [B, 3, H, W] on the device of the model.
            seconds: Time to spend on each schedule in `compare`, if a few passes take less.
        """
        self.scheduled_model, self.images, self.seconds = scheduled_model, images, seconds
        self.spread = 0.0

    @torch.no_grad()
    def layer_costs(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Costs of the layers `first` to `last` in one run."""
        model = self.scheduled_model.use(schedule)
        times = [self._now()]
        for _ in islice(model.steps(self.images), last):
            times.append(self._now())
        return [after - before for before, after in pairwise(times)][first - 1 :]

    @torch.no_grad()
    def compare(self, schedules: Sequence[Schedule]) -> list[float]:
        """Times of forward passes that take turns, so a busy machine slows all of them alike."""
        timings = time_in_rounds(
            schedules,
            self.scheduled_model.use,
            lambda model: model(self.images),
            device=self.images.device,
            seconds=self.seconds,
            least_rounds=MIN_ROUNDS,
            most_rounds=_MAX_ROUNDS,
        )
        self.spread = max(timing.spread for timing in timings)
        return [timing.seconds for timing in timings]

    @torch.no_grad()
    def single_cost(self, schedule: Schedule) -> float:
        """Seconds of one forward pass."""
        model = self.scheduled_model.use(schedule)
        before = self._now()
        model(self.images)
        return self._now() - before

    def _now(self) -> float:
        if self.images.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


class MacCounter:
    """Counts the multiply-accumulates of one image."""

    exact = True
    spread = 0.0
    start_seconds = 0.0

    def __init__(self, scheduled_model: ScheduledModel) -> None:
        self.scheduled_model = scheduled_model

    def layer_costs(self, schedule: Schedule, first: int, last: int) -> list[float]:
        """Costs of the layers `first` to `last` in one run."""
        model = self.scheduled_model.use(schedule)

        def run(call: nn.Module) -> Iterator[Step]:
            dtype = next(call.parameters()).dtype
            images = torch.empty(1, *model.anatomy.input_shape, device="meta", dtype=dtype)
            return islice(model.steps(images), last)

        return [float(macs) for macs in count_macs_by_part(model, run)[first - 1 :]]

    def single_cost(self, schedule: Schedule) -> float:
        """Multiply-accumulates, as `DialViT.cost` counts them."""
        return self.scheduled_model.use(schedule).cost().macs

    def compare(self, schedules: Sequence[Schedule]) -> list[float]:
        """Multiply-accumulates of each schedule."""
        return list(map(self.single_cost, schedules))
