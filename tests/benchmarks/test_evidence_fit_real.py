"""The parts of evidence_fit_real that need no real model."""

import numpy as np
import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from benchmarks.evidence_fit_real import Case, at_time, constant_schedules, judge, overlap, summary
from tokendial.measure import neighbour_overlap
from tokendial.tune.schedules import ScheduleSpace


def test_values_of_a_picture_are_read_between_the_two_nearest_times():
    times = [1.0, 0.75, 0.5]
    values = [np.array([1.0, 1.0]), np.array([0.6, 1.0]), np.array([0.2, 0.0])]
    np.testing.assert_allclose(at_time(times, values, 0.8), [0.68, 1.0])
    np.testing.assert_allclose(at_time(times, values, 0.625), [0.4, 0.5])
    # All are slower: the fastest one is the nearest.
    np.testing.assert_allclose(at_time(times, values, 0.1), [0.2, 0.0])


def test_a_disturbed_time_does_not_put_a_harder_schedule_before_a_milder_one():
    # The third one seems to be slower than the second one; both are taken for 0.7.
    times = [1.0, 0.6, 0.8, 0.5]
    values = [np.array([value]) for value in (1.0, 0.9, 0.3, 0.2)]
    assert at_time(times, values, 0.85)[0] == pytest.approx(0.95)
    assert at_time(times, values, 0.6)[0] == pytest.approx(0.25)


def test_masks_overlap_by_intersection_over_union():
    first, second = (torch.zeros(2, 1, 1, 8, dtype=torch.bool) for _ in range(2))
    first[0, ..., :4], second[0, ..., 2:8] = True, True
    assert overlap(first, second).tolist() == pytest.approx([2 / 8, 1.0])


def test_differences_are_paired_over_pictures_and_seeds():
    draw = np.random.default_rng(0)
    rows = []
    for seed in range(3):
        constant = draw.uniform(size=40)
        fitted = constant + 0.01 * (seed + 1)
        rows.append(
            {"speedup": 1.5, "time": 0.6, "removed": (1,), "images": 8}
            | {"fitted": fitted, "constant": constant}
        )
    found = summary("masks", rows)
    assert found["difference by seed"] == pytest.approx([0.01, 0.02, 0.03])
    assert found["difference"]["value"] == pytest.approx(0.02)
    low, high = (found["difference"][end] for end in ("low", "high"))
    assert 0.0099 < low < high < 0.0301
    assert found["fitted"]["high"] - found["fitted"]["low"] > 0.05


@torch.no_grad()
def test_schedules_are_judged_beside_the_unreduced_model():
    model = td.wrap(tiny_vit(num_classes=0)).eval()
    space = ScheduleSpace(td.ToMe(), model.anatomy.shape)
    seen = images(12)

    def values(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return neighbour_overlap(first, second, neighbours=3)

    case = Case("neighbours", model, lambda seed: seen, seen, model.embeddings, values)
    schedules = [space.none, *constant_schedules(space)]
    found = judge(case, space, schedules)
    assert found[0].tolist() == [1.0] * 12
    assert found[-1].mean() < 1
    assert model.degrees == (0,)
    reduced = td.wrap(tiny_vit(num_classes=0), reduce=td.ToMe(r=list(schedules[-1]))).eval()
    expected = values(reduced.embeddings(seen), model.embeddings(seen))
    np.testing.assert_allclose(found[-1], expected.numpy())
