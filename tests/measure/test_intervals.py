import pytest
import torch

from tokendial.measure.intervals import (
    Interval,
    Resampling,
    bootstrap_interval,
    percentile_interval,
)


def mean(values):
    return values.float().mean()


def difference(first, second):
    return (first - second).mean()


@pytest.mark.parametrize(("level", "low", "high"), [(0.4, 0.5, 0.5), (0.9, 0.0, 1.0)])
def test_matches_worked_example(level, low, high):
    """Means of two draws from 0 and 1 are 0, 1/2 and 1, with probabilities 1/4, 1/2 and 1/4."""
    interval = bootstrap_interval(mean, torch.tensor([0.0, 1.0]), level=level)
    assert (interval.value, interval.low, interval.high) == (0.5, low, high)


def test_covers_the_true_rate_about_as_often_as_promised():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(300):
        right = (torch.rand(100, generator=generator) < 0.8).float()
        interval = bootstrap_interval(mean, right, level=0.9, resamples=200, seed=trial)
        covered += interval.low <= 0.8 <= interval.high
    assert 0.84 <= covered / 300 <= 0.95


def test_a_difference_is_paired():
    """Two models that err on the same images differ by one image, in every resample by few."""
    first = (torch.arange(200) % 4 > 0).float()
    second = first.clone()
    second[1] = 0
    gain = bootstrap_interval(difference, first, second)
    assert gain.value == pytest.approx(0.005)
    assert gain.low >= 0
    assert gain.high <= 0.02


def test_runs_are_drawn_as_well_as_images():
    rates = torch.tensor([[0.7], [0.8], [0.9]]).expand(3, 50)
    interval = bootstrap_interval(mean, rates)
    assert interval.low == pytest.approx(0.7, abs=0.03)
    assert interval.high == pytest.approx(0.9, abs=0.03)
    one_run = bootstrap_interval(mean, rates[1])
    assert one_run.high - one_run.low < 1e-6


def test_images_stay_the_same_for_all_runs():
    """A score that compares runs image by image sees whole columns."""
    runs = torch.arange(30.0).expand(2, 30)
    largest = bootstrap_interval(lambda values: (values[0] - values[1]).abs().max(), runs)
    assert largest.high == 0


def test_the_seed_decides():
    values = torch.linspace(0, 1, 37) ** 2
    first, again, other = (bootstrap_interval(mean, values, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ((), {}, "samples must be at least one tensor, got none."),
        ((torch.ones(0),), {}, r"shape \[N\] or \[R, N\], none 0, got \[0\]"),
        ((torch.ones(3), torch.ones(4)), {}, r"all have shape \[3\], got \[4\]"),
        ((torch.ones(3),), {"level": 1.0}, r"level must lie in \(0, 1\), got 1.0"),
        ((torch.ones(3),), {"resamples": 0}, "resamples must be"),
    ],
)
def test_bad_input_is_refused_in_one_line(samples, settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(lambda *values: torch.zeros(()), *samples, **settings)


def test_groups_are_drawn_whole():
    groups = ["owl", "cup", "owl", "cup", "cup"]
    for runs, images in Resampling(5, 3, groups=groups, resamples=50):
        assert runs.shape == (3,)
        drawn = [groups[image] for image in images]
        assert drawn.count("owl") % 2 == 0
        assert drawn.count("cup") % 3 == 0
        assert drawn.count("owl") / 2 + drawn.count("cup") / 3 == 2


def test_groups_must_name_every_image():
    with pytest.raises(ValueError, match="groups must name 5 images, got 2."):
        Resampling(5, groups=["owl", "cup"])


def test_resamples_without_a_score_are_left_out():
    interval = percentile_interval(0.5, [0.1, float("nan"), 0.9], level=0.5)
    assert (interval.low, interval.high) == pytest.approx((0.3, 0.7))


def test_an_interval_is_shown_in_percent():
    assert Interval(0.851, 0.82, 0.8789).percent() == "85.1 (82.0, 87.9)"
    assert Interval(0.01, -0.02, 0.04).percent(sign=True) == "+1.0 (-2.0, +4.0)"
