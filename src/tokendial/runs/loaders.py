"""Data sets with transforms, loaders for evaluation, and seeds of all random generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokendial.data.transforms.image import PairTransform
from tokendial.signals import ignore_stop_signals
from tokendial.tasks import collate


class TransformedDataset(Dataset[tuple[Tensor, Any]]):
    """A data set with a transform. Its random numbers depend on (seed, epoch, index, copy) alone.

    Items are indexed by (epoch, index, copy): the same key gives the same sample in any process.
    """

    def __init__(
        self, source: Dataset[tuple[Any, Any]], transform: PairTransform, seed: int
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # map-style data sets have a length

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Any]:
        image, target = self.source[key[1]]
        with temporary_seed(self.seed, *key):
            return self.transform(image, target)


@contextmanager
def temporary_seed(*key: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python from `key`, and restore them after the block.

    Transforms and timm's mixup use all three.
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
    """Seed the global generators of torch (on all devices), NumPy and Python from `key`."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def eval_loader(
    source: Dataset[tuple[Any, Any]],
    transform: PairTransform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[Any]:
    """A loader of every sample once, in order. Each process gets its part.

    A data set with fewer samples than processes is given whole to each of them. Means over all
    processes stay the same, while a process without samples would have no metrics to gather.

    Args:
        source: The data set: pairs of an image, or video, and a target.
        transform: Prepares a pair.
        batch_size: Samples per batch.
        workers: Processes that load samples; 0: the calling process loads them.
        rank: Number of this process, counted from 0.
        processes: Number of processes that evaluate together.
    """
    dataset = TransformedDataset(source, transform, seed=0)
    if len(dataset) < processes:
        rank, processes = 0, 1
    keys = [(0, index, 0) for index in range(rank, len(dataset), processes)]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )
