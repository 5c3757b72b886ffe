"""Token schedules: how many tokens each layer of a model removes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokendial.reduce.schedules import PerLayer, ScheduledConfig, patches_after_layers
from tokendial.reduce.tome import merge_schedule
from tokendial.shape import ViTShape

Schedule = tuple[int, ...]
"""Number of patch tokens that each layer removes."""


@dataclass(frozen=True)
class ScheduleSpace:
    """The schedules that a reduction method allows in a model."""

    reduce: ScheduledConfig
    """The method. If it lists schedules, they are where a search starts."""
    shape: ViTShape
    """Shape of the model."""

    def tokens_left(self, removed: Sequence[int]) -> tuple[int, ...]:
        """Number of patch tokens that leave each layer."""
        return patches_after_layers(self.shape.num_patches, removed, self.reduce.max_removed)

    def normalise(self, removed: Sequence[int]) -> Schedule:
        """Lower each number to what can be removed; the tokens left stay the same."""
        before, schedule = self.shape.num_patches, []
        for after in self.tokens_left(removed):
            schedule.append(before - after)
            before = after
        return tuple(schedule)

    def linear(self, r: int, inflection: float = 0.0) -> Schedule:
        """ToMe's schedule: `r` in each layer, or a linear change over the layers with mean `r`."""
        return self.normalise(merge_schedule(r, self.shape.depth, inflection))

    def all_linear(self, inflection: float = 0.0) -> list[Schedule]:
        """All distinct schedules of one inflection, from removing nothing to the most."""
        rs = range(self.reduce.max_removed(self.shape.num_patches) + 1)
        return list(dict.fromkeys(self.linear(r, inflection) for r in rs))

    @cached_property
    def given(self) -> list[Schedule]:
        """The schedules that the method lists."""
        return [self.normalise(schedule) for schedule in self.reduce.schedules(self.shape)]

    def scaled(self, schedule: Schedule, factor: float) -> Schedule:
        """The schedule with `factor` times as many tokens removed in each layer."""
        patches = self.shape.num_patches
        shares = PerLayer(min(1.0, factor * removed / patches) for removed in schedule)
        return self.normalise(shares.counts(patches))

    @cached_property
    def none(self) -> Schedule:
        """The schedule that removes nothing."""
        return (0,) * self.shape.depth

    @property
    def strongest(self) -> Schedule:
        """The schedule that removes as many tokens as possible in each layer."""
        return self.normalise([self.shape.num_patches] * self.shape.depth)

    def shortest_to(self, patches: int) -> Schedule:
        """First layers of the schedule that has `patches` tokens left after the fewest layers."""
        removed: list[int] = []
        now = self.shape.num_patches
        while now > patches and len(removed) < self.shape.depth:
            removed.append(min(now - patches, self.reduce.max_removed(now)) or now)
            now -= removed[-1]
        return tuple(removed)
