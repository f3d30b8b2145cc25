import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robust_core.certificates import statistics as s

COMMON = settings(deadline=None, derandomize=True, max_examples=50)


def at_most(failures, trials, alpha):
    return failures / trials <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("k", "n", "bound", "quantile"),
    [
        (100, 100, 0.9332543, 1.50048),
        (1000, 1000, 0.99311605, 2.46326),
        (10**4, 10**4, 0.99930946, 3.19858),
        (10**5, 10**5, 0.99993092, 3.81146),
        (990, 1000, 0.97603619, None),
        (51000, 10**5, 0.50510935, None),
    ],
)
def test_clopper_pearson_matches_the_published_vectors(k, n, bound, quantile):
    p = float(s.clopper_pearson_lower(k, n, 0.001))
    assert p == pytest.approx(bound, abs=1e-8)
    if quantile is not None:
        assert float(s.normal_quantile_lower(p)) == pytest.approx(quantile, abs=1e-5)


@COMMON
@given(n=st.integers(1, 10**4), mean=st.floats(0, 1), alpha=st.sampled_from([1e-9, 1e-3, 0.05]))
def test_chernoff_meets_its_equation_and_lies_between_hoeffding_and_the_exact_bound(n, mean, alpha):
    low = float(s.chernoff_lower(mean, n, alpha))
    assert low <= mean
    assert low >= float(s.hoeffding_lower(mean, n, alpha)) - 1e-9  # Pinsker's inequality
    assert float(s.chernoff_upper(1 - mean, n, alpha)) == pytest.approx(1 - low, abs=1e-9)
    k = math.floor(n * mean)
    assert float(s.chernoff_lower(k / n, n, alpha)) <= float(s.clopper_pearson_lower(k, n, alpha)) + 1e-9
    assert float(s.chernoff_lower(1.0, n, alpha)) == pytest.approx(alpha ** (1 / n), rel=1e-9)
    assert s.chernoff_lower(0.0, n, alpha) == 0


def test_chernoff_covers_means_of_dependent_parts():
    generator = np.random.default_rng(0)
    shared = generator.random((4000, 20, 1))  # 20 draws; the 5 parts of a draw go together
    values = (shared < 0.9 + 0.02 * np.arange(5)).mean(2)
    failures = (s.chernoff_lower(values.mean(1), 20, 0.1) > 0.94).sum()
    assert at_most(failures, 4000, 0.1)


@COMMON
@given(n=st.integers(1, 10**6), share=st.floats(0, 1), alpha=st.sampled_from([1e-9, 1e-3, 0.05, 0.5]))
def test_bounds_err_on_the_safe_side_of_the_exact_tail(n, share, alpha):
    k = round(n * share)
    low, high = float(s.clopper_pearson_lower(k, n, alpha)), float(s.clopper_pearson_upper(k, n, alpha))
    assert 0 <= low <= k / n <= high <= 1 or alpha == 0.5
    assert low == 0 if k == 0 else stats.binom.sf(k - 1, n, low) <= alpha * (1 + 1e-9)
    assert high == 1 if k == n else stats.binom.cdf(k, n, high) <= alpha * (1 + 1e-9)
    assert low == pytest.approx(stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0, rel=1e-7)


def test_two_sided_interval_splits_the_budget_and_keeps_the_container():
    k = torch.tensor([0, 3, 10])
    low, high = s.clopper_pearson(k, 10, 0.05)
    assert isinstance(low, torch.Tensor)
    assert low.dtype == torch.float64
    reference = [stats.binomtest(int(i), 10).proportion_ci(0.95, method="exact") for i in k]
    assert low.tolist() == pytest.approx([r.low for r in reference], abs=1e-9)
    assert high.tolist() == pytest.approx([r.high for r in reference], abs=1e-9)
    assert isinstance(s.clopper_pearson_lower(np.array([1]), 2, 0.1), np.ndarray)


@pytest.mark.quick
def test_coverage_of_the_one_sided_bounds():
    rng = np.random.default_rng(0)
    for p, n, alpha in ((0.9, 200, 0.05), (0.55, 1000, 0.01), (0.999, 500, 0.02)):
        k = rng.binomial(n, p, 2000)
        assert at_most((s.clopper_pearson_lower(k, n, alpha) > p).sum(), 2000, alpha)
        assert at_most((s.clopper_pearson_upper(k, n, alpha) < p).sum(), 2000, alpha)


def test_coverage_of_the_bounds_for_values_in_an_interval():
    rng = np.random.default_rng(1)
    n, alpha = 200, 0.05
    for a, b in ((9.0, 1.0), (0.3, 0.2), (50.0, 50.0)):
        x = rng.beta(a, b, (2000, n))
        mean, variance = x.mean(1), x.var(1, ddof=1)
        truth = a / (a + b)
        assert at_most((s.hoeffding_lower(mean, n, alpha) > truth).sum(), 2000, alpha)
        assert at_most((s.hoeffding_upper(mean, n, alpha) < truth).sum(), 2000, alpha)
        assert at_most((s.empirical_bernstein_lower(mean, variance, n, alpha) > truth).sum(), 2000, alpha)
    assert float(s.hoeffding_lower(0.9, 1000, 0.001)) == pytest.approx(0.9 - math.sqrt(math.log(1000) / 2000))
    log = math.log(2000)
    expected = 0.9 - math.sqrt(2 * 0.01 * log / 1000) - 7 * log / (3 * 999)
    assert float(s.empirical_bernstein_lower(0.9, 0.01, 1000, 0.001)) == pytest.approx(expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("k", "n", "p"), [(510, 1000, 0.5480), (560, 1000, 1.650e-4), (11, 11, 9.766e-4), (10, 10, 1.953e-3)]
)
def test_p_value_matches_the_published_vectors(k, n, p):
    assert float(s.binomial_p_value(k, n)) == pytest.approx(p, rel=5e-4)


@COMMON
@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_p_value_matches_scipy(n, share):
    k = round(n * share)
    assert float(s.binomial_p_value(k, n)) == pytest.approx(stats.binomtest(k, n).pvalue, rel=1e-9)


def test_anytime_bounds_hold_at_all_sample_sizes_at_once():
    rng = np.random.default_rng(2)
    n = np.unique(np.geomspace(1, 2000, 120).astype(int))
    for p in (0.5, 0.9, 0.99):
        path = np.cumsum(rng.random((2000, 2000)) < p, axis=1)[:, n - 1]
        alpha = 0.05
        assert at_most((s.anytime_lower(path, n, alpha) > p).any(1).sum(), 2000, alpha)
        assert at_most((s.anytime_upper(path, n, alpha) < p).any(1).sum(), 2000, alpha)


@COMMON
@given(n=st.integers(1, 10**5), share=st.floats(0, 1), alpha=st.sampled_from([1e-3, 0.05]))
def test_anytime_bound_is_where_the_wealth_reaches_the_level(n, share, alpha):
    k = round(n * share)
    low = float(s.anytime_lower(k, n, alpha))
    assert 0 <= low <= float(s.clopper_pearson_lower(k, n, alpha)) + 1e-12
    if 1e-12 < low < k / n:
        wealth = mpmath.log(mpmath.beta(k + 0.5, n - k + 0.5) / mpmath.pi) - k * mpmath.log(low)
        wealth -= (n - k) * mpmath.log1p(-low) if k < n else 0
        assert float(wealth) == pytest.approx(math.log(1 / alpha), rel=1e-4)
        assert float(wealth) >= math.log(1 / alpha)


@COMMON
@given(z=st.floats(-8, 8))
def test_normal_functions_are_rounded_to_their_side(z):
    with mpmath.workdps(40):
        truth = mpmath.ncdf(mpmath.mpf(z))
        upper = float(s.normal_cdf_upper(z))
        assert truth <= upper <= truth * (1 + mpmath.mpf("1e-11")) + mpmath.mpf("1e-15")
        p = min(float(truth), 1 - 2.0**-53)
        assert mpmath.ncdf(float(s.normal_quantile_lower(p))) <= p <= mpmath.ncdf(float(s.normal_quantile_upper(p)))
    assert float(s.normal_quantile_lower(0.0)) == -math.inf


@given(alpha=st.floats(1e-9, 0.5), weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
@COMMON
def test_budgets_never_exceed_the_whole(alpha, weights):
    parts = s.split_alpha(alpha, len(weights), weights=weights)
    assert math.fsum(parts) <= alpha
    assert math.fsum(parts) == pytest.approx(alpha)
    assert s.family_alpha(alpha, 7, "simultaneous") == alpha / 7
    assert s.family_alpha(alpha, 7) == alpha


@pytest.mark.parametrize(
    "call",
    [
        lambda: s.clopper_pearson_lower(3, 2, 0.1),
        lambda: s.clopper_pearson_lower(-1, 2, 0.1),
        lambda: s.clopper_pearson_lower(0.5, 2, 0.1),
        lambda: s.clopper_pearson_lower(0, 0, 0.1),
        lambda: s.clopper_pearson_lower(1, 2, 0.0),
        lambda: s.clopper_pearson_lower(1, 2, 1.0),
        lambda: s.clopper_pearson_lower(math.nan, 2, 0.1),
        lambda: s.hoeffding_lower(1.5, 10, 0.1),
        lambda: s.empirical_bernstein_lower(0.5, -0.1, 10, 0.1),
        lambda: s.binomial_p_value(3, 2),
        lambda: s.normal_quantile_lower(1.5),
        lambda: s.split_alpha(0.1, 2, weights=[1.0, 0.0]),
        lambda: s.family_alpha(0.1, 2, "all"),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"\w"):
        call()
