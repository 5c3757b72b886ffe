import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from tokendial.cascade import largest_share, smallest_sample, smallest_share


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_are_those_of_clopper_and_pearson(counted):
    count, total = counted
    upper = beta.ppf(0.95, count + 1, total - count) if count < total else 1.0
    lower = beta.ppf(0.05, count, total - count + 1) if count else 0.0
    assert largest_share(count, total, 0.95) == pytest.approx(upper, abs=1e-9)
    assert smallest_share(count, total, 0.95) == pytest.approx(lower, abs=1e-9)


@pytest.mark.parametrize("share", [0.003, 0.05, 0.4])
def test_the_bound_is_exceeded_no_more_often_than_promised(share):
    total = 400
    wrong = sum(
        binom.pmf(count, total, share)
        for count in range(total + 1)
        if largest_share(count, total, 0.95) < share
    )
    assert wrong <= 0.05


@pytest.mark.parametrize(("most", "needed"), [(0.01, 299), (0.05, 59), (0.5, 5)])
def test_a_sample_without_any_shows_the_share_from_a_size_on(most, needed):
    assert smallest_sample(most, 0.95) == needed
    assert largest_share(0, needed, 0.95) <= most < largest_share(0, needed - 1, 0.95)
