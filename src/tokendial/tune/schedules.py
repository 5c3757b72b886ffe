"""Schedules: how many tokens each layer removes, by a method and in a model."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokendial.reduce import EViT, ToMe
from tokendial.reduce.evit import most_removed
from tokendial.reduce.listed import patches_left
from tokendial.reduce.tome import merge_schedule, most_merged
from tokendial.shape import ViTShape

Schedule = tuple[int, ...]
"""Patch tokens that each layer removes."""


@dataclass(frozen=True)
class ScheduleSpace:
    """All schedules of a method in a model."""

    reduce: ToMe | EViT
    """The method; its own numbers of tokens are not read."""
    shape: ViTShape
    """The model."""

    def most(self, patches: int) -> int:
        """How many of so many patch tokens can go in one layer."""
        if isinstance(self.reduce, ToMe):
            return most_merged(patches, self.reduce.stride)
        return most_removed(patches, self.reduce.rest)

    def left(self, removed: Sequence[int]) -> tuple[int, ...]:
        """Patch tokens that leave each layer."""
        return patches_left(self.shape.num_patches, removed, self.most)

    def normal(self, removed: Sequence[int]) -> Schedule:
        """The schedule that does the same without asking for more than can go."""
        before, schedule = self.shape.num_patches, []
        for after in self.left(removed):
            schedule.append(before - after)
            before = after
        return tuple(schedule)

    def line(self, r: int, inflection: float = 0.0) -> Schedule:
        """ToMe's schedules: `r` in each layer, or a line with that mean."""
        return self.normal(merge_schedule(r, self.shape.depth, inflection))

    def lines(self, inflection: float = 0.0) -> list[Schedule]:
        """All of one slope that differ, from none to the most that can go."""
        rs = range(self.most(self.shape.num_patches) + 1)
        return list(dict.fromkeys(self.line(r, inflection) for r in rs))

    @cached_property
    def none(self) -> Schedule:
        """Removes nothing."""
        return (0,) * self.shape.depth

    @property
    def strongest(self) -> Schedule:
        """Removes in each layer as many as can go."""
        return self.normal([self.shape.num_patches] * self.shape.depth)

    def reaching(self, patches: int) -> Schedule:
        """The first layers of a schedule that has `patches` left as soon as possible."""
        removed: list[int] = []
        now = self.shape.num_patches
        while now > patches and len(removed) < self.shape.depth:
            removed.append(min(now - patches, self.most(now)) or now)
            now -= removed[-1]
        return tuple(removed)

    def method(self, schedules: Sequence[Schedule]) -> ToMe | EViT:
        """The method with these schedules as its degrees 1, 2, ..."""
        r = [list(schedule) for schedule in schedules]
        if isinstance(self.reduce, ToMe):
            return dataclasses.replace(self.reduce, r=r, inflection=0.0)
        return dataclasses.replace(self.reduce, r=r, keep_rate=None, shrink=None)
