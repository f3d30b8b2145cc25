"""Bets: the bound is where the wealth says it is, fails as rarely as promised at all times, and heeds the variance."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from robust_core.certificates.betting import MOST, PRIOR, SHARE, betting_lower, betting_upper
from robust_core.certificates.statistics import chernoff_lower, empirical_bernstein_lower


def slow_lower(x: np.ndarray, alpha: float, planned: int) -> float:
    """Bet value by value, and halve the interval of m."""

    def refuted(m: float) -> bool:
        wealth, total, spread = 0.0, 0.5, 0.0
        for i, value in enumerate(x.tolist(), 1):
            variance = (PRIOR + spread) / i
            stake = min(math.sqrt(2 * -math.log(alpha) / (variance * max(i, planned / 4))), MOST)
            wealth += math.log(1 + min(stake, SHARE / max(m, 1e-9)) * (value - m))
            total += value
            spread += (value - total / (i + 1)) ** 2
        return wealth >= -math.log(alpha)

    low, high = 0.0, 1.0
    if not refuted(0.0):
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@pytest.mark.quick
@given(st.integers(0, 10**6), st.integers(1, 70), st.floats(0.1, 20), st.floats(0.001, 0.5), st.integers(0, 300))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_the_bound_is_the_end_of_what_is_refuted(seed: int, n: int, shape: float, alpha: float, more: int) -> None:
    x = np.random.default_rng(seed).beta(shape, 2.0, n)
    wanted = slow_lower(x, alpha, n + more)
    found = float(betting_lower(x, alpha, planned=n + more))
    assert wanted - 2e-5 <= found <= wanted + 1e-8
    assert float(betting_upper(1.0 - x, alpha, planned=n + more)) == pytest.approx(1.0 - found, abs=2e-5)


@pytest.mark.parametrize("law", ["bernoulli", "beta", "rare"])
def test_it_fails_as_rarely_as_promised_whenever_one_looks(law: str) -> None:
    draw, n, alpha, runs = np.random.default_rng(1), 200, 0.2, 1500
    mean = {"bernoulli": 0.7, "beta": 0.4, "rare": 0.02}[law]
    x = draw.beta(8, 12, (runs, n)) if law == "beta" else draw.binomial(1, mean, (runs, n)).astype(float)
    looks = [betting_lower(x[:, :size], alpha, planned=n) for size in range(10, n + 1, 10)]
    assert (np.max(looks, 0) > mean).mean() <= alpha
    looks = [betting_upper(x[:, :size], alpha, planned=n) for size in range(10, n + 1, 10)]
    assert (np.min(looks, 0) < mean).mean() <= alpha


def test_values_that_hardly_vary_give_a_narrow_bound() -> None:
    x = 0.5 + 0.02 * (np.random.default_rng(2).random((5, 1000)) - 0.5)
    width = x.mean(1) - betting_lower(x, 1e-4)
    bernstein = x.mean(1) - empirical_bernstein_lower(x.mean(1), x.var(1, ddof=1), 1000, 1e-4)
    assert (width < bernstein / 3).all()
    coins = np.random.default_rng(3).binomial(1, 0.5, (50, 1000)).astype(float)
    width = (coins.mean(1) - betting_lower(coins, 1e-4)).mean()
    assert width < 1.2 * (coins.mean(1) - chernoff_lower(coins.mean(1), 1000, 1e-4)).mean()


def test_shapes_devices_and_refusals() -> None:
    x = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0))
    found = betting_lower(x, 0.05)
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    assert float(betting_lower(x[1, 1], 0.05)) == pytest.approx(float(found[1, 1]), abs=2e-5)
    assert float(betting_lower(np.ones(1), 0.01)) < 0.2
    assert float(betting_lower(np.zeros(50), 0.01)) == 0.0
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        betting_lower(np.array([1.5]), 0.05)
    with pytest.raises(ValueError, match="at least one value"):
        betting_lower(np.empty((3, 0)), 0.05)
    with pytest.raises(ValueError, match="NaN"):
        betting_lower(np.array([math.nan]), 0.05)
    with pytest.raises(ValueError, match="planned=3"):
        betting_lower(np.ones(4), 0.05, planned=3)
