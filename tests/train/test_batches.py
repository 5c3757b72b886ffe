import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tokendial.runs.loaders import TransformedDataset, temporary_seed
from tokendial.train.batches import EpochSampler


def sampler(rank=0, processes=1, batch_size=4, accumulate=2, size=50, repeats=1):
    return EpochSampler(
        size,
        batch_size=batch_size,
        accumulate=accumulate,
        seed=5,
        rank=rank,
        processes=processes,
        repeats=repeats,
    )


def indices(sampler, epoch=0, update=0):
    sampler.start(epoch, update)
    return [[index for _, index, _ in batch] for batch in sampler]


def test_an_epoch_shows_every_sample_at_most_once():
    shown = [index for batch in indices(sampler()) for index in batch]
    assert len(shown) == len(set(shown)) == 48
    assert len(indices(sampler())) == len(sampler())


def test_epochs_differ_in_order():
    assert indices(sampler(), epoch=0) != indices(sampler(), epoch=1)


def test_starting_later_gives_the_rest():
    assert indices(sampler(), update=4) == indices(sampler())[8:]


def test_two_processes_see_together_what_one_sees_with_twice_the_batch():
    one = indices(sampler(batch_size=8, accumulate=1))
    parts = [indices(sampler(rank, 2, 4, 1)) for rank in range(2)]
    for whole, first, second in zip(one, *parts, strict=True):
        assert set(whole) == {*first, *second}


def test_repeated_images_are_augmented_copies_in_one_update_of_an_epoch_of_the_same_length():
    repeated = list(sampler(batch_size=6, accumulate=1, repeats=3))
    assert len(repeated) == len(sampler(batch_size=6, accumulate=1)) == 8
    for batch in repeated:
        (a, b, c), (d, e, f) = batch[:3], batch[3:]
        assert [copy for _, _, copy in batch] == [0, 1, 2, 0, 1, 2]
        assert a[1] == b[1] == c[1] != d[1] == e[1] == f[1]
    assert len({index for batch in repeated for _, index, _ in batch}) == 16
    parts = [list(sampler(rank, 3, 2, 1, repeats=3)) for rank in range(3)]
    for whole, *shares in zip(repeated, *parts, strict=True):
        assert set(whole) == {key for share in shares for key in share}
        # The copies of an image go to different processes.
        assert all(len({index for _, index, _ in share}) == 2 for share in shares)


def test_a_set_smaller_than_one_update_raises():
    with pytest.raises(ValueError, match="one update takes 8 images, but the training set has 7"):
        sampler(size=7)


def test_augmentation_depends_on_epoch_and_index_alone():
    def noise(image, target):
        return torch.rand(1) + random.random() + float(np.random.rand()), target  # noqa: NPY002

    prepared = TransformedDataset([(None, 0)] * 3, noise, seed=0)
    first = prepared[(0, 1, 0)][0]
    random.random()
    torch.rand(3)
    assert torch.equal(prepared[(0, 1, 0)][0], first)
    assert not torch.equal(prepared[(1, 1, 0)][0], first)
    assert not torch.equal(prepared[(0, 2, 0)][0], first)
    assert not torch.equal(prepared[(0, 1, 1)][0], first)


def test_seeding_a_block_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with temporary_seed(1, 2, 3):
        torch.rand(5)
    assert torch.equal(torch.rand(1), expected)


STUCK = """
import sys
from tokendial.runs.loaders import eval_loader
loading = iter(eval_loader(range(8), None, batch_size=1, workers=1))
sys.excepthook = lambda *error: setattr(sys, "kept", (loading, error))
raise RuntimeError
"""


def test_a_program_that_fails_while_processes_load_ends():
    # A traceback keeps objects alive until Python ends, and so the loading processes.
    done = subprocess.run([sys.executable, "-c", STUCK], timeout=120, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")
