import json
import math

import pytest
import torch

from tokendial.cascade import CascadeCalibration, Observations, choose_thresholds

RISING = torch.arange(1000.0)[None] / 1000


def simulated(count, seed, *, stages=1):
    """Images of which a stage is surer where its answer is likelier to be the last stage's."""
    draw = torch.Generator().manual_seed(seed)
    sure = torch.rand(stages, count, generator=draw)
    sure = sure + torch.arange(stages)[:, None] * (1 - sure) / 2  # later stages are surer
    harmed = torch.rand(stages, count, generator=draw) < 0.3 * (1 - sure) ** 2
    return Observations(sure, harmed)


@pytest.mark.parametrize("stages", [1, 2])
def test_the_promise_is_broken_in_at_most_five_of_a_hundred_calibrations(stages):
    # The share of harmed images that thresholds lead to is counted on a hundred thousand others.
    many = simulated(100_000, 12345, stages=stages)
    broken = tight = 0
    for seed in range(200):
        found = choose_thresholds(simulated(1000, seed, stages=stages), "changed", 0.02, seed=seed)
        share = float(many.is_harmed(found.thresholds).float().mean())
        broken += share > 0.02
        tight += share > 0.007
    assert broken <= 10
    assert tight > 150  # no more images are sent on than the bound needs


def test_images_are_answered_by_the_first_stage_that_is_sure():
    sure = torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.9, 0.1]])
    harmed = torch.tensor([[True, True, False], [False, True, True]])
    observations = Observations(sure, harmed)
    assert observations.stage_of((0.5, 0.5)).tolist() == [0, 1, 2]
    assert observations.is_harmed((0.5, 0.5)).tolist() == [True, True, False]
    assert observations.stage_of((math.inf, 0.5)).tolist() == [1, 1, 2]


def test_no_image_is_answered_early_if_every_early_answer_is_harmful():
    observations = Observations(RISING, torch.ones(1, 1000, dtype=torch.bool))
    found = choose_thresholds(observations, "lost", 0.01)
    assert found.thresholds == (math.inf,)
    assert (found.sent_on, found.harmed) == ((1.0,), 0)
    assert found.bound <= 0.01


def test_every_image_is_answered_early_if_none_is_harmed():
    observations = Observations(RISING, torch.zeros(1, 1000, dtype=torch.bool))
    found = choose_thresholds(observations, "changed", 0.01)
    assert found.sent_on[0] < 0.02
    low, high = found.sent_on_range[0]
    assert low <= found.sent_on[0] <= high


def test_too_few_images_say_how_many_are_needed():
    with pytest.raises(ValueError, match=r"max_changed 0.01 .* needs at least 375 images .* 300"):
        choose_thresholds(simulated(300, 0), "changed", 0.01)
    choose_thresholds(simulated(375, 0), "changed", 0.01)


@pytest.mark.parametrize(
    ("allowed", "confidence", "message"),
    [
        (0.0, 0.95, r"max_lost must lie in \(0, 1\), got 0"),
        (1.5, 0.95, r"max_lost must lie in \(0, 1\), got 1.5"),
        (0.1, 1.0, r"confidence must lie in \(0, 1\), got 1"),
    ],
)
def test_numbers_out_of_range_are_named(allowed, confidence, message):
    with pytest.raises(ValueError, match=message):
        choose_thresholds(simulated(500, 0), "lost", allowed, confidence=confidence)


@pytest.mark.parametrize("all_harmed", [False, True])
def test_a_calibration_survives_json(all_harmed):
    observations = Observations(RISING, torch.full((1, 1000), all_harmed))
    found = choose_thresholds(observations, "changed", 0.005)
    assert math.isinf(found.thresholds[0]) == all_harmed
    text = json.dumps(found.to_json(), allow_nan=False)
    assert CascadeCalibration.from_json(json.loads(text)) == found
