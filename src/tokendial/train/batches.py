"""Training batches that depend only on the seed, not on workers, processes or interruptions."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from tokendial.runs.loaders import TransformedDataset
from tokendial.signals import ignore_stop_signals


class EpochSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (epoch, index, copy) for one epoch and one process, starting at any update.

    The order of an epoch depends on (seed, epoch) alone. Update `u` takes the next
    `batch_size * accumulate * processes` samples, so that two processes together see what one
    process with twice the batch would see. Samples that do not fill an update are left out.

    With `repeats` above 1 (repeated augmentation) the epoch keeps its length, but takes only the
    first 1/repeats of its order. Each image appears `repeats` times in a row, each time augmented
    anew. Processes take turns in this row, so that all copies of an image are in the same update.
    DeiT's and timm's samplers do the same; they round an epoch down to a multiple of 256 images,
    this one to whole updates.
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

        Args:
            size: Number of samples in the training set.
            batch_size: Samples in one batch.
            accumulate: Batches of one process in one update.
            seed: Seed of the order.
            rank: Number of this process, counted from 0.
            processes: Number of processes.
            repeats: How often each image appears in an epoch.

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
        """Choose the epoch, and how many of its updates are finished already."""
        self.epoch, self.first_update = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        distinct = order[: -(-self.size // self.repeats)].tolist()
        samples = [(self.epoch, index, copy) for index in distinct for copy in range(self.repeats)]
        for update in range(self.first_update, self.updates):
            first = update * self.per_update
            own = samples[first + self.rank : first + self.per_update : self.processes]
            for part in range(self.accumulate):
                yield own[part * self.batch_size : (part + 1) * self.batch_size]


class TimedBatches(Iterator[Any]):
    """The batches of a loader, and the fraction of the time that was spent waiting for them."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._batches = iter(loader)
        self._waited = self._elapsed()

    def __next__(self) -> Any:
        before = self._elapsed()
        try:
            return next(self._batches)
        finally:
            self._waited += self._elapsed() - before

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    @property
    def wait_fraction(self) -> float:
        """Fraction of the time since the start that was spent waiting for batches, in [0, 1]."""
        return self._waited / self._elapsed()


def train_loader(
    dataset: TransformedDataset, sampler: EpochSampler, workers: int
) -> DataLoader[Any]:
    """A loader of the batches that `sampler` gives, with `workers` loading processes."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )
