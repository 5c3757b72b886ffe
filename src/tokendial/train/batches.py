"""Batches that are the same whatever happens: any number of workers, killed and resumed."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokendial.data.transforms.image import PairTransform
from tokendial.tasks import collate
from tokendial.train.signals import leave_signals_to_the_parent


class Prepared(Dataset[tuple[Tensor, Any]]):
    """Transforms the samples of a data set; chance depends on (seed, epoch, index, copy) alone."""

    def __init__(
        self, source: Dataset[tuple[Any, Any]], transform: PairTransform, seed: int
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # map-style sets have a length

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Any]:
        image, target = self.source[key[1]]
        with seeded(self.seed, *key):
            return self.transform(image, target)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python from `key`, and put them back after.

    Transforms and timm's mixup draw from all three.
    """
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(*key)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def seed_all(*key: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python from `key`."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


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


def eval_loader(
    source: Dataset[tuple[Any, Any]],
    transform: PairTransform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[Any]:
    """Loader of every sample once, in order; each process gets its share.

    Sets that are too small to give each process a sample are given to each of them whole: means
    over all processes stay the same, and metrics cannot be gathered from a process that saw none.
    """
    dataset = Prepared(source, transform, seed=0)
    if len(dataset) < processes:
        rank, processes = 0, 1
    keys = [(0, index, 0) for index in range(rank, len(dataset), processes)]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
    )
