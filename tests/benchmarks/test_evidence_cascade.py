"""The parts of the cascade's table that can be counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.evidence_real import cascade
from tokendial.cascade import Observations
from tokendial.runs.cascade import scores_at_time

RIGHT = {0: torch.tensor([1.0, 1.0]), 3: torch.tensor([1.0, 0.0]), 6: torch.tensor([0.0, 0.0])}
SECONDS = {0: 4.0, 3: 2.0, 6: 1.0}


@pytest.mark.parametrize(
    ("time_s", "expected"),
    [(1.0, [0, 0]), (1.5, [0.5, 0]), (2.5, [1, 0.25]), (9.0, [1, 1]), (0.5, [0, 0])],
)
def test_two_fixed_degrees_share_the_images(time_s, expected):
    assert scores_at_time(RIGHT, SECONDS, time_s).tolist() == expected


def test_fixed_degrees_that_are_slower_and_worse_do_not_count():
    """A slow machine, or few tokens, may make a cheaper degree the slower one."""
    seconds = {0: 2.0, 3: 4.0, 6: 1.0}
    for time_s, expected in ((2.0, [1, 1]), (3.0, [1, 1]), (9.0, [1, 1]), (1.5, [0.5, 0.5])):
        assert scores_at_time(RIGHT, seconds, time_s).tolist() == expected


def test_broken_promises_are_counted(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    sure = torch.rand(1, 600, generator=draw)
    harmed = torch.rand(1, 600, generator=draw) > 0.5 + sure  # the surest half is never harmed
    found = Observations(sure, harmed)
    assert cascade.broken_promises(found, 0) <= 0.07 * cascade.CALIBRATIONS

    def careless(observations, *_, **__):
        return SimpleNamespace(thresholds=(float(observations.sure.quantile(0.1)),))

    monkeypatch.setattr(cascade, "choose_thresholds", careless)
    assert cascade.broken_promises(found, 0) > 0.5 * cascade.CALIBRATIONS


def test_classes_count_alike():
    right, labels = np.array([1, 1, 1, 0.5]), np.array([0, 0, 0, 1])
    assert cascade.balanced_share(right, labels) == 0.75
