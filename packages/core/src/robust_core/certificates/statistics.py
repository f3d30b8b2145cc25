"""Exact statistics behind every probabilistic certificate, rounded to the side that cannot overclaim.

All functions take Python numbers, numpy arrays or tensors (broadcast against each other), compute in float64 and
return a tensor if they were given one, else a numpy array. Lower bounds are rounded down and upper bounds up by
more than the error of the special functions they use, so that floating point never turns a bound into a claim.

* Bernoulli means: :func:`clopper_pearson_lower`, :func:`clopper_pearson_upper`, :func:`clopper_pearson` (exact at one
  sample size fixed beforehand; Clopper and Pearson 1934) and :func:`anytime_lower`, :func:`anytime_upper` (valid at
  all sample sizes at once, so that one may look after every sample; a bet against each mean with a Beta(1/2, 1/2)
  mixture and Ville's inequality).
* means of values in [0, 1]: :func:`chernoff_lower`, :func:`chernoff_upper` (Hoeffding 1963, theorem 1; near 0 and 1 as
  narrow as the exact interval of a Bernoulli mean), :func:`hoeffding_lower`, :func:`empirical_bernstein_lower`
  (Maurer and Pontil 2009).
* two classes: :func:`binomial_p_value`, two-sided, against 1/2 (Hung and Fithian 2019).
* one budget of failure per claim: :func:`split_alpha`, :func:`family_alpha`.
* normal distribution: :func:`normal_cdf_upper`, :func:`normal_quantile_lower`, :func:`normal_quantile_upper`.

Tests at several looks planned beforehand are in :mod:`robust_core.certificates.sequential`. Left out: asymptotic
intervals, and the randomised Clopper-Pearson interval (its gain is less than one count, its bound is a draw).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_number

__all__ = [
    "anytime_lower",
    "anytime_upper",
    "binomial_p_value",
    "chernoff_lower",
    "chernoff_upper",
    "clopper_pearson",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "empirical_bernstein_lower",
    "family_alpha",
    "hoeffding_lower",
    "hoeffding_upper",
    "normal_cdf_upper",
    "normal_quantile_lower",
    "normal_quantile_upper",
    "split_alpha",
]

Numbers = Any
"""A number, a numpy array or a tensor."""

SLACK = 1e-12
"""Relative widening of every bound: a thousand times the error of scipy's special functions."""


def _read(**values: Numbers) -> tuple[list[np.ndarray], torch.device | None]:
    """Return float64 arrays, broadcast, and the device of the first tensor among them (None: no tensor)."""
    device, arrays = None, []
    for name, value in values.items():
        if isinstance(value, Tensor):
            device = value.device if device is None else device
            value = value.detach().cpu().numpy()
        array = np.asarray(value, dtype=np.float64)
        if np.isnan(array).any():
            raise ValueError(f"{name} holds NaN")
        arrays.append(array)
    return list(np.broadcast_arrays(*arrays)), device


def _write(array: np.ndarray, device: torch.device | None) -> Any:
    return array if device is None else torch.as_tensor(np.array(array), dtype=torch.float64, device=device)


def _counts(k: Numbers, n: Numbers) -> tuple[np.ndarray, np.ndarray, torch.device | None]:
    (k, n), device = _read(k=k, n=n)
    if (n < 1).any() or (n != np.floor(n)).any():
        raise ValueError("n: counts of trials are integers of at least 1")
    if (k < 0).any() or (k > n).any() or (k != np.floor(k)).any():
        raise ValueError("k: counts of successes are integers in 0 .. n")
    return k, n, device


def _alpha(alpha: float) -> float:
    return check_number("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)


def clopper_pearson_lower(k: Numbers, n: Numbers, alpha: float) -> Any:
    """Return the exact one-sided lower confidence bound of a Bernoulli mean.

    Args:
        k: successes, integers in 0 .. n.
        n: trials.
        alpha: failure probability: the bound exceeds the mean with at most this probability.

    Returns:
        ``beta.ppf(alpha, k, n - k + 1)``, 0 where k = 0, rounded down.
    """
    k, n, device = _counts(k, n)
    return _write(_exact_lower(k, n, _alpha(alpha)), device)


def clopper_pearson_upper(k: Numbers, n: Numbers, alpha: float) -> Any:
    """Return the exact one-sided upper confidence bound of a Bernoulli mean, rounded up; see the lower one."""
    k, n, device = _counts(k, n)
    return _write(1.0 - _exact_lower(n - k, n, _alpha(alpha)), device)


def clopper_pearson(k: Numbers, n: Numbers, alpha: float) -> tuple[Any, Any]:
    """Return the exact two-sided interval: each end fails with probability at most ``alpha / 2``."""
    half = _alpha(alpha) / 2
    return clopper_pearson_lower(k, n, half), clopper_pearson_upper(k, n, half)


def _exact_lower(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    bound = special.betaincinv(np.maximum(k, 1.0), n - k + 1.0, alpha)
    # Near 1 what matters is the distance to 1, so the slack is taken from there too.
    bound = np.minimum(bound * (1.0 - SLACK), 1.0 - (1.0 - bound) * (1.0 + SLACK))
    # P(K >= k) at the bound may not exceed alpha: look, and retreat where the inverse was not that good.
    for _ in range(60):
        over = (k > 0) & (special.betainc(np.maximum(k, 1.0), n - k + 1.0, bound) > alpha)
        if not over.any():
            break
        bound = np.where(over, bound * (1.0 - 1e-9), bound)
    return np.where(k > 0, np.clip(bound, 0.0, 1.0), 0.0)


def chernoff_lower(mean: Numbers, n: Numbers, alpha: float) -> Any:
    """Return the mean m below the sample mean with ``n KL(sample mean, m) = ln(1 / alpha)``, rounded down.

    Valid for independent values in [0, 1], whose moment generating functions a Bernoulli variable of the same mean
    bounds; KL is the divergence of Bernoulli distributions. A sample mean of 1 gives the exact ``alpha^(1 / n)``.

    Args:
        mean: sample mean.
        n: sample size.
        alpha: failure probability.
    """
    (mean, n), device = _means(mean, n)
    return _write(_chernoff_lower(mean, n, _alpha(alpha)), device)


def chernoff_upper(mean: Numbers, n: Numbers, alpha: float) -> Any:
    """Return the upper counterpart of :func:`chernoff_lower`."""
    (mean, n), device = _means(mean, n)
    return _write(1.0 - _chernoff_lower(1.0 - mean, n, _alpha(alpha)), device)


def _chernoff_lower(mean: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    budget = -math.log(alpha) / n * (1.0 + SLACK) + SLACK
    low, high = np.zeros_like(mean), mean + 0.0
    for _ in range(80):  # the divergence falls from infinity to 0 between 0 and the sample mean
        middle = 0.5 * (low + high)
        divergence = special.rel_entr(mean, middle) + special.rel_entr(1.0 - mean, 1.0 - middle)
        low, high = np.where(divergence >= budget, middle, low), np.where(divergence >= budget, high, middle)
    return low


def hoeffding_lower(mean: Numbers, n: Numbers, alpha: float) -> Any:
    """Return ``mean - sqrt(ln(1 / alpha) / 2n)``, at least 0: a lower bound of the mean of values in [0, 1]."""
    (mean, n), device = _means(mean, n)
    width = np.sqrt(-math.log(_alpha(alpha)) / (2.0 * n)) * (1.0 + SLACK)
    return _write(np.clip(mean - width - SLACK, 0.0, 1.0), device)


def hoeffding_upper(mean: Numbers, n: Numbers, alpha: float) -> Any:
    """Return ``mean + sqrt(ln(1 / alpha) / 2n)``, at most 1."""
    (mean, n), device = _means(mean, n)
    width = np.sqrt(-math.log(_alpha(alpha)) / (2.0 * n)) * (1.0 + SLACK)
    return _write(np.clip(mean + width + SLACK, 0.0, 1.0), device)


def empirical_bernstein_lower(mean: Numbers, variance: Numbers, n: Numbers, alpha: float) -> Any:
    """Return a lower bound of the mean of values in [0, 1] that is narrow where their variance is small.

    ``mean - sqrt(2 V ln(2 / alpha) / n) - 7 ln(2 / alpha) / (3 (n - 1))``, at least 0.

    Args:
        mean: sample mean.
        variance: *unbiased* sample variance V.
        n: sample size; the bound is 0 for n = 1.
        alpha: failure probability.
    """
    (mean, variance, n), device = _read(mean=mean, variance=variance, n=n)
    _means(mean, n)
    if (variance < 0).any():
        raise ValueError("variance: values of at least 0 are needed")
    log = math.log(2.0 / _alpha(alpha))
    width = np.sqrt(2.0 * variance * log / n) + 7.0 * log / (3.0 * np.maximum(n - 1.0, 0.5))
    bound = np.clip(mean - width * (1.0 + SLACK) - SLACK, 0.0, 1.0)
    return _write(np.where(n > 1, bound, 0.0), device)


def _means(mean: Numbers, n: Numbers) -> tuple[list[np.ndarray], torch.device | None]:
    (mean, n), device = _read(mean=mean, n=n)
    if (n < 1).any():
        raise ValueError("n: sample sizes of at least 1 are needed")
    if (mean < 0).any() or (mean > 1).any():
        raise ValueError("mean: the bound is for values in [0, 1]; rescale them first")
    return [mean, n], device


def binomial_p_value(k: Numbers, n: Numbers) -> Any:
    """Return the exact two-sided p-value of ``k`` heads in ``n`` tosses of a fair coin, rounded up; 1 for n = 0."""
    (k, n), device = _read(k=k, n=n)
    if (k < 0).any() or (k > n).any():
        raise ValueError("k: counts of heads lie in 0 .. n")
    few = np.minimum(k, n - k)
    p = 2.0 * special.betainc(np.maximum(n - few, 0.5), few + 1.0, 0.5) * (1.0 + SLACK)
    return _write(np.where(2 * few >= n, 1.0, np.minimum(p, 1.0)), device)


def anytime_lower(k: Numbers, n: Numbers, alpha: float) -> Any:
    """Return a lower bound of a Bernoulli mean that holds at every sample size at once.

    With probability at least 1 - alpha the bound lies below the mean after *every* sample, so sampling may stop at
    any moment, for any reason. It is the smallest mean whose accuser, a bettor with the wealth
    ``B(k + 1/2, n - k + 1/2) / (B(1/2, 1/2) m^k (1 - m)^(n - k))``, has not reached ``1 / alpha``.

    Args:
        k: successes so far.
        n: trials so far.
        alpha: failure probability over the whole sequence.
    """
    k, n, device = _counts(k, n)
    return _write(_betting_lower(k, n, _alpha(alpha)), device)


def anytime_upper(k: Numbers, n: Numbers, alpha: float) -> Any:
    """Return the upper counterpart of :func:`anytime_lower`."""
    k, n, device = _counts(k, n)
    return _write(1.0 - _betting_lower(n - k, n, _alpha(alpha)), device)


def _betting_lower(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    # log of the likelihood at which the wealth is exactly 1 / alpha; below k / n the likelihood grows with the mean
    level = special.betaln(k + 0.5, n - k + 0.5) - math.log(math.pi) + math.log(alpha)
    level = level - 1e-9 * (1.0 + np.abs(level))
    low, high = np.zeros_like(n), k / n
    for _ in range(80):
        middle = 0.5 * (low + high)
        rejected = special.xlogy(k, middle) + special.xlog1py(n - k, -middle) <= level
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


def split_alpha(alpha: float, m: int, *, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Return the budgets of ``m`` bounds that one claim is built of: they sum to ``alpha`` at most.

    Args:
        alpha: failure probability of the claim.
        m: number of bounds.
        weights: (m,) positive shares; equal ones by default.
    """
    _alpha(alpha)
    shares = [1.0] * check_count("m", m) if weights is None else [float(weight) for weight in weights]
    if len(shares) != m or min(shares) <= 0 or not math.isfinite(sum(shares)):
        raise ValueError(f"weights={weights!r}: {m} positive finite numbers are needed")
    total = math.fsum(shares) * (1.0 + 4 * 2.0**-53)
    return tuple(alpha * (share / total) for share in shares)


def family_alpha(alpha: float, n: int, family: str = "each") -> float:
    """Return the budget of each of ``n`` claims.

    Args:
        alpha: failure probability.
        n: number of claims, normally the size of the test set.
        family: ``"each"``: every claim fails with probability alpha, so ``alpha * n`` false ones are expected;
            ``"simultaneous"``: *any* of them fails with probability at most alpha (union bound).
    """
    check_choice("family", family, ("each", "simultaneous"))
    return _alpha(alpha) / check_count("n", n) if family == "simultaneous" else _alpha(alpha)


def normal_cdf_upper(z: Numbers) -> Any:
    """Return the standard normal distribution function, rounded up."""
    (z,), device = _read(z=z)
    value = special.ndtr(z)
    # above 1/2 the relative slack belongs to the distance to 1, plus one unit in the last place
    upper = np.where(value > 0.5, value + (1.0 - value) * SLACK + 2.0**-53, value * (1.0 + SLACK))
    return _write(np.minimum(upper, 1.0), device)


def normal_quantile_lower(p: Numbers) -> Any:
    """Return the standard normal quantile, rounded down; -inf at 0, inf at 1."""
    (p,), device = _read(p=p)
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p: probabilities in [0, 1] are needed")
    z = special.ndtri(p)
    finite = np.isfinite(z)
    return _write(np.where(finite, z - SLACK * (1.0 + np.abs(np.where(finite, z, 0.0))), z), device)


def normal_quantile_upper(p: Numbers) -> Any:
    """Return the standard normal quantile, rounded up."""
    (p,), device = _read(p=p)
    low = np.asarray(normal_quantile_lower(p))
    size = 1.0 + np.abs(np.where(np.isfinite(low), low, 0.0))
    return _write(low + 3.0 * SLACK * size, device)
