"""Batches that are the same whatever happens: any number of workers, killed and resumed."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from tokendial.runs.loaders import Prepared
from tokendial.signals import leave_signals_to_the_parent


class EpochSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (epoch, index, copy) for one epoch and one process, from any step on.

    The order of an epoch depends on (seed, epoch) alone. Update `u` takes the next
    `batch_size * accumulate * processes` samples, so that two processes see together what one
    process with twice the batch would see. What is left at the end is not used in this epoch.

    With `repeats` an epoch is as long as before, but shows only the first part of its order, each
    image so many times in a row, each time varied differently. Processes take turns in this row, so
    that the copies of an image are in the same update. DeiT's and timm's samplers do the same; they
    round an epoch down to a multiple of 256 images, we to whole updates.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int,
        processes: int,
        repeats: int = 1,
    ) -> None:
        """Set up the sampler.

        Raises:
            ValueError: If the data set is smaller than one update.
        """
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.seed, self.rank, self.processes, self.repeats = seed, rank, processes, repeats
        self.per_update = batch_size * accumulate * processes
        self.updates = size // self.per_update
        self.epoch, self.first_update = 0, 0
        if not self.updates:
            raise ValueError(
                f"train.batch_size: one update takes {self.per_update} images, but the training "
                f"set has {size}."
            )

    def start(self, epoch: int, update: int = 0) -> None:
        """Choose the epoch, and how many of its updates have been done already."""
        self.epoch, self.first_update = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        distinct = shuffled[: -(-self.size // self.repeats)].tolist()
        row = [(self.epoch, index, copy) for index in distinct for copy in range(self.repeats)]
        for update in range(self.first_update, self.updates):
            first = update * self.per_update
            mine = row[first + self.rank : first + self.per_update : self.processes]
            for part in range(self.accumulate):
                yield mine[part * self.batch_size : (part + 1) * self.batch_size]


class Awaited(Iterator[Any]):
    """Hands out the batches of a loader, and tells what share of the time went into waiting."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._batches = iter(loader)
        self._waited = self._now()

    def __next__(self) -> Any:
        before = self._now()
        try:
            return next(self._batches)
        finally:
            self._waited += self._now() - before

    def _now(self) -> float:
        return time.perf_counter() - self._start

    @property
    def waited(self) -> float:
        """Share of the time since the start, in [0, 1]."""
        return self._waited / self._now()


def train_loader(dataset: Prepared, sampler: EpochSampler, workers: int) -> DataLoader[Any]:
    """Loader of the batches that `sampler` names."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
    )
